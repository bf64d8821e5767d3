"""Which weights ZeRO-3 gathers in a step, and how many it holds at once.

DeepSpeed gathers a module's own weights when the module is entered, in forward and in backward. It learns the order
of these visits in the first pass, and from then on gathers ahead and keeps what is soon used again. Both follow from
the order and the numbers of elements alone, so the rule is followed here visit by visit
(`partitioned_param_coordinator.py` of DeepSpeed 0.19.8: `fetch_sub_module`, `release_sub_module`).
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from megatron_crnet.config.batch import BatchPlan
from megatron_crnet.config.deepspeed_rules import zero_option
from megatron_crnet.config.positions import GROUPS
from megatron_crnet.config.schema import Config
from megatron_crnet.planning.operations import outputs_are_kept
from megatron_crnet.planning.shards import Chunk, LocalModel

FETCH, RELEASE, DROP = "fetch", "release", "drop"
"""Weights are needed; are free unless they are soon used again; are free in any case, unless they are persistent."""

Visit = tuple[str, str]
"""What happens, and the module, named as the owner of `LocalParameter`s. Modules without weights count as steps."""


@dataclass(frozen=True)
class Limits:
    """Settings of `zero_optimization`, in elements; see DeepSpeed's documentation."""

    prefetch: int
    live: int
    reuse: int
    persistent: int
    all_persistent: int


def read_limits(config: Config) -> Limits:
    """The settings of a run, DeepSpeed's defaults where it gives none."""
    return Limits(
        zero_option(config, "stage3_prefetch_bucket_size", 50_000_000),
        zero_option(config, "stage3_max_live_parameters", 1_000_000_000),
        zero_option(config, "stage3_max_reuse_distance", 1_000_000_000),
        zero_option(config, "stage3_param_persistence_threshold", 100_000),
        zero_option(config, "stage3_model_persistence_threshold", sys.maxsize),
    )


@dataclass(frozen=True)
class Gathered:
    """Of one rank and step.

    Attributes:
        calls: all-gathers.
        numel: elements that they bring, with padding to equal shares.
        live: the most elements that are whole at once.
    """

    calls: int
    numel: int
    live: int


def estimate_gathers(model: LocalModel, plan: BatchPlan) -> Gathered:
    """The weights that a rank of this stage gathers in a step that is not the first."""
    (chunk,) = model.chunks  # ZeRO-3 has no pipeline
    one = Coordinator(list(visits(model, chunk)), model, read_limits(model.config), plan.dp_size)
    whole = one.learn(frozenset())
    # what is kept is decided in the second pass, and remembered
    for _ in range(plan.num_microbatches - 1):
        whole = one.follow(whole).left
    calls = numel = live = 0
    whole = one.persistent
    for _ in range(plan.num_microbatches):
        found = one.follow(whole)
        calls, numel, live, whole = calls + found.calls, numel + found.numel, max(live, found.live), found.left
    # after the update, each in a call of its own
    return Gathered(calls + len(one.persistent), numel + one.padded(one.persistent), live)


@dataclass(frozen=True)
class Pass:
    """One micro-batch: what was gathered in how many calls, the most at once, and which weights stay."""

    calls: int
    numel: int
    live: int
    left: frozenset[int]


class Coordinator:
    """DeepSpeed's decisions about the weights of one rank, which are numbered as in `LocalModel.parameters`.

    Args:
        order: the visits of one micro-batch.
    """

    def __init__(self, order: list[Visit], model: LocalModel, limits: Limits, dp_size: int) -> None:
        self._order, self._limits, self._dp_size = order, limits, dp_size
        self._numels = [p.numel for p in model.parameters]
        self._owned: dict[str, list[int]] = {}
        for index, parameter in enumerate(model.parameters):
            self._owned.setdefault(parameter.owner, []).append(index)
        self.persistent = frozenset(self._find_persistent())
        steps = [self._owned.get(module, []) for what, module in order if what == FETCH]
        self._uses: list[list[int]] = [[] for _ in self._numels]
        for step, own in enumerate(steps):
            for index in own:
                self._uses[index].append(step)
        self._trace = [(index, step) for step, own in enumerate(steps) for index in own]
        self._passed = [0, *accumulate(sum(self._numels[index] for index in own) for own in steps)]
        self._released: dict[int, frozenset[int]] = {}
        self._known: dict[frozenset[int], Pass] = {}

    def _find_persistent(self) -> Iterator[int]:
        total = 0
        for index, numel in enumerate(self._numels):
            if numel <= self._limits.persistent and total + numel <= self._limits.all_persistent:
                total += numel
                yield index

    def padded(self, indices: Iterable[int]) -> int:
        """Elements of weights when every rank has an equal share."""
        return sum(-(-self._numels[index] // self._dp_size) * self._dp_size for index in indices)

    def learn(self, whole: frozenset[int]) -> frozenset[int]:
        """The first pass: everything is released after its use. Returns which weights stay."""
        left = set(whole)
        for what, module in self._order:
            own = self._owned.get(module, [])
            if what == FETCH:
                left.update(own)
            else:
                left.difference_update(own if what == RELEASE else set(own) - self.persistent)
        return frozenset(left)

    def follow(self, whole: frozenset[int]) -> Pass:
        """A later pass that finds some weights whole."""
        if whole not in self._known:
            self._known[whole] = _Following(self, set(whole)).run()
        return self._known[whole]

    def stays(self, index: int, step: int) -> bool:
        """Whether a weight is used again within the reuse distance from a step on."""
        later = bisect_left(self._uses[index], step)
        if later == len(self._uses[index]):
            return False
        return self._passed[self._uses[index][later]] - self._passed[step] < self._limits.reuse


class _Following:
    """One pass by the learned order."""

    def __init__(self, rules: Coordinator, whole: set[int]) -> None:
        self._rules, self._whole = rules, whole
        self._numels, self._limits = rules._numels, rules._limits
        self._queue = deque(rules._trace)
        self._fetched_for = [-1] * len(self._numels)
        # DeepSpeed starts every pass at 0, whatever is whole, and may fall below
        self._counted = 0
        self._held = self._live = sum(self._numels[index] for index in whole)
        self._calls = self._gathered = 0

    def run(self) -> Pass:
        step = 0
        for position, (what, module) in enumerate(self._rules._order):
            own = self._rules._owned.get(module, [])
            if what == FETCH:
                self._gather(own)
                self._take_from_queue(own, step)
                self._prefetch()
                step += 1
            elif own:
                self._release(own, what, position, step)
        return Pass(self._calls, self._gathered, self._live, frozenset(self._whole))

    def _gather(self, indices: list[int]) -> None:
        missing = [index for index in indices if index not in self._whole]
        if not missing:
            return
        numel = sum(self._numels[index] for index in missing)
        self._whole.update(missing)
        self._calls, self._gathered = self._calls + 1, self._gathered + self._rules.padded(missing)
        self._counted, self._held = self._counted + numel, self._held + numel
        self._live = max(self._live, self._held)

    def _take_from_queue(self, own: list[int], step: int) -> None:
        new = sum(self._fetched_for[index] < step for index in own)
        taken: set[int] = set()
        while self._queue and len(taken) < new:
            index, used = self._queue.popleft()
            self._fetched_for[index] = used
            taken.add(index)

    def _prefetch(self) -> None:
        room, numel, chosen = min(self._limits.live - self._counted, self._limits.prefetch), 0, []
        while self._queue and numel < room:
            index, used = self._queue.popleft()
            self._fetched_for[index] = max(self._fetched_for[index], used)
            if index not in self._whole and index not in chosen:
                chosen.append(index)
                numel += self._numels[index]
        self._gather(chosen)

    def _release(self, own: list[int], what: str, position: int, step: int) -> None:
        if what == DROP:
            free = frozenset(own) - self._rules.persistent
        else:
            # DeepSpeed remembers what it has decided here in the first pass that followed the order
            free = self._rules._released.setdefault(position, frozenset(self._free(own, step)))
        for index in free & self._whole:
            self._whole.remove(index)
            self._counted, self._held = self._counted - self._numels[index], self._held - self._numels[index]

    def _free(self, own: list[int], step: int) -> Iterator[int]:
        for index in own:
            # a later use that prefetching has passed over would not be fetched again
            needed = self._fetched_for[index] > step or self._rules.stays(index, step)
            if index not in self._rules.persistent and not needed:
                yield index


def visits(model: LocalModel, chunk: Chunk) -> Iterator[Visit]:
    """The modules of one micro-batch in the order of DeepSpeed's hooks, forward and backward."""
    yield from _fetches("model", "embedding")
    yield from _whole("embedding.word")
    yield from _fetches("embedding.dropout", "rotary", "decoder")
    for layer in chunk.layers:
        yield from _forward(model, layer)
    yield from (*_whole("final_norm"), *_whole("output"))
    yield from (*_fetches("model"), *_whole("output"), *_fetches("decoder"), *_whole("final_norm"))
    for segment in reversed(chunk.segments or [range(layer, layer + 1) for layer in chunk.layers]):
        yield from _backward_of_segment(model, chunk, segment)
    yield from (*_fetches("embedding", "embedding.dropout", "embedding.word"), (DROP, "embedding.word"))


def _fetches(*modules: str) -> Iterator[Visit]:
    yield from ((FETCH, module) for module in modules)


def _whole(module: str) -> Iterator[Visit]:
    yield from ((FETCH, module), (RELEASE, module))


def _forward(model: LocalModel, layer: int, *, resumed: bool = False) -> Iterator[Visit]:
    """A layer; `resumed` where a full-rank product is not done again."""
    yield from (*_fetches(f"{layer}"), *_whole(f"{layer}.input_norm"), *_group(model, layer, "qkv", resumed))
    yield from (*_fetches(f"{layer}.attention"), *_group(model, layer, "o", resumed), *_whole(f"{layer}.mlp_norm"))
    yield from (*_group(model, layer, "gate_up", resumed), *_group(model, layer, "down", resumed))


def _group(model: LocalModel, layer: int, name: str, resumed: bool = False) -> Iterator[Visit]:
    if not model.transformer.is_full_rank(layer):
        yield from _whole(f"{layer}.{name}")
        return
    # Megatron-Core's layer, which holds the weight, inside of the group
    yield from _fetches(f"{layer}.{name}")
    if not resumed:
        yield from _whole(f"{layer}.{name}.linear")


def _backward(model: LocalModel, layer: int) -> Iterator[Visit]:
    """A layer; hooks fire for every output whose gradient arrives."""
    yield from _fetches(f"{layer}") if not model.transformer.has_next(layer) else _fetches(*[f"{layer}"] * 8)
    yield from (*_backward_group(model, layer, "down"), *_backward_group(model, layer, "gate_up"))
    yield from (*_whole(f"{layer}.mlp_norm"), *_backward_group(model, layer, "o"), *_fetches(f"{layer}.attention"))
    yield from (*_backward_group(model, layer, "qkv"), *_whole(f"{layer}.input_norm"))


def _backward_group(model: LocalModel, layer: int, name: str) -> Iterator[Visit]:
    yield from _fetches(*[f"{layer}.{name}"] * len(GROUPS[name]))
    if model.transformer.is_full_rank(layer):
        yield from _whole(f"{layer}.{name}.linear")
    else:
        yield RELEASE, f"{layer}.{name}"


def _backward_of_segment(model: LocalModel, chunk: Chunk, segment: range) -> Iterator[Visit]:
    """Layers that are recomputed together (`recompute/segment.py`), or one that is not recomputed."""
    strategy = model.transformer.recompute_strategy if chunk.segments else "none"
    if strategy == "full":
        for layer in segment:
            yield from _forward(model, layer)
    if strategy == "replay":
        for layer in segment:
            if not outputs_are_kept(model, chunk, segment, layer):
                yield from _rebuilt(model, layer)
    for layer in reversed(segment):
        if strategy == "inverse" and layer != segment[0]:
            yield from _rebuilt(model, layer)
        if strategy in ("replay", "inverse"):
            known = layer != segment[-1] or outputs_are_kept(model, chunk, segment, layer)
            yield from _forward(model, layer, resumed=known)
        yield from _backward(model, layer)


def _rebuilt(model: LocalModel, layer: int) -> Iterator[Visit]:
    """Products with B; where no chain passes, only those that lead to the residual stream."""
    if model.transformer.is_full_rank(layer):
        return
    chained = model.transformer.has_previous(layer) or model.transformer.has_next(layer)
    for name in GROUPS if chained else ("o", "down"):
        yield from _whole(f"{layer}.{name}")
