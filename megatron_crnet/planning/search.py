"""Searches the fastest layout on N GPUs among those that fit, by the estimate.

Every candidate is a configuration, checked by the rules of `config/` and rated by `estimate.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any, get_args

from megatron_crnet.config.deepspeed import keys_for_stage
from megatron_crnet.config.parallel_section import Dispatcher
from megatron_crnet.config.schema import Config
from megatron_crnet.planning.estimate import Estimate, estimate
from megatron_crnet.planning.machines import GIB, Machine
from megatron_crnet.utils.errors import ConfigError

RESERVE = 0.1
"""Share of device memory reserved for the CUDA context, NCCL and fragmentation."""

EQUAL = 0.9995
"""Share of the best tokens/s above which a plan is reported as equally fast."""

RECOMPUTATION: dict[str, dict[str, Any]] = {
    "none": {"strategy": "none", "keep_attention_output": False, "inverse_tolerance": None},
    "replay, attention kept": {"strategy": "replay", "keep_attention_output": True, "inverse_tolerance": None},
    "replay": {"strategy": "replay", "keep_attention_output": False, "inverse_tolerance": None},
    "full": {"strategy": "full", "keep_attention_output": False, "inverse_tolerance": None},
}

DISPATCHERS: tuple[Dispatcher, ...] = get_args(Dispatcher)


@dataclass(frozen=True)
class Choice:
    """A candidate layout; reports use the names of the fields."""

    tp: int
    pp: int
    vpp: int
    zero: int
    micro_batch: int
    recompute: str
    offload: bool
    ep: int = 1
    dispatcher: Dispatcher = "allgather"


@dataclass(frozen=True)
class Plan:
    """An allowed choice with its configuration and estimate."""

    choice: Choice
    config: Config
    estimate: Estimate


@dataclass
class Search:
    """The state of a search.

    Attributes:
        total: number of candidates, of which `tried` have been rated.
        refused: candidates that the configuration's rules refuse; `refusal` is the first message.
        too_large: candidates that exceed the memory.
        fitting: plans that fit, in the order of candidates.
        least: the allowed plan with the lowest peak.
    """

    total: int = 0
    tried: int = 0
    refused: int = 0
    too_large: int = 0
    fitting: list[Plan] = field(default_factory=list)
    least: Plan | None = None
    refusal: str = ""
    stopped: bool = False

    def ranked(self) -> list[Plan]:
        """Plans that fit, by tokens per second, then by peak memory."""
        return sorted(self.fitting, key=lambda plan: (-plan.estimate.tokens_per_second, plan.estimate.peak))


def choices(config: Config, gpus: int, gpus_per_node: int) -> list[Choice]:
    """Every combination to try, allowed or not."""
    layers, batch = config.model.num_layers, config.training.global_batch_size
    found: list[Choice] = []
    for tp in (tp for tp in _powers(gpus_per_node) if gpus % tp == 0):
        for pp in (pp for pp in range(1, min(layers, gpus // tp) + 1) if gpus // tp % pp == 0):
            dp = gpus // tp // pp
            # if none divides the batch, the rules refuse 1 with a message
            micro = [size for size in _powers(max(batch // dp, 1)) if batch % (size * dp) == 0] or [1]
            vpps = [vpp for vpp in (1, 2, 4) if vpp == 1 or pp > 1]
            # stage 0 sums bf16 gradients in bf16, which changes the results (docs/parallelism.md)
            least = 1 if config.training.bf16 else 0
            zeros = [zero for zero in (0, 1, 2, 3) if zero >= least and (zero < 2 or pp == 1)]
            offloads = (False, True) if tp == pp == 1 else (False,)
            # experts that are spread are so over as many ranks as asked, or over the tensor-parallel ones
            asked = config.parallel.expert_model_parallel_size
            eps = sorted({tp, asked}) if asked > 1 else [1]
            spreads = [(ep, way) for ep in eps for way in DISPATCHERS[: 1 if ep == 1 else None]]
            rows = product(vpps, zeros, micro, RECOMPUTATION, offloads, spreads)
            found += [Choice(tp, pp, *row, *spread) for *row, spread in rows]
    return found


def _powers(limit: int) -> list[int]:
    """Powers of two up to `limit`."""
    return [2**exponent for exponent in range(limit.bit_length())]


def uneven_stages(layers: int, pp: int, vpp: int) -> tuple[int | None, int | None]:
    """Layers of the first and the last stage if `pp` does not divide `layers`, else None.

    They have fewer than the others, because they also hold the embedding and the loss.
    """
    if pp == 1 or vpp > 1 or layers % pp == 0 or layers < pp:
        return None, None
    if pp == 2:
        return layers - layers // 2, layers // 2
    inner = -(-layers // pp)
    if layers - (pp - 2) * inner < 2:
        inner -= 1
    ends = layers - (pp - 2) * inner
    return ends - ends // 2, ends // 2


def configure(config: Config, choice: Choice) -> Config:
    """The configuration of a choice; other fields stay.

    Raises:
        ConfigError: the rules refuse it.
    """
    deepspeed = dict(config.deepspeed)
    zero = keys_for_stage(deepspeed.get("zero_optimization", {}), choice.zero)
    given = zero.pop("offload_optimizer", None)
    if choice.offload:
        zero["offload_optimizer"] = given if given and given.get("device") == "cpu" else {"device": "cpu"}
    if choice.recompute == "none":
        deepspeed.pop("activation_checkpointing", None)
    first, last = uneven_stages(config.model.num_layers, choice.pp, choice.vpp)
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(
            config.parallel,
            tensor_model_parallel_size=choice.tp,
            expert_model_parallel_size=choice.ep,
            moe_token_dispatcher_type=choice.dispatcher,
            pipeline_model_parallel_size=choice.pp,
            virtual_pipeline_model_parallel_size=choice.vpp,
            sequence_parallel=False if config.parallel.sequence_parallel is False else None,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
        ),
        training=dataclasses.replace(config.training, micro_batch_size=choice.micro_batch),
        recompute=dataclasses.replace(config.recompute, **RECOMPUTATION[choice.recompute]),
        deepspeed={**deepspeed, "zero_optimization": zero},
    )


def search(
    config: Config,
    gpus: int,
    machine: Machine,
    gpus_per_node: int,
    progress: Callable[[list[Choice]], Any] = iter,
) -> Search:
    """Rate every candidate; Ctrl-C ends the search early.

    Args:
        progress: wraps the list of candidates, such as tqdm.
    """
    candidates = choices(config, gpus, gpus_per_node)
    found = Search(total=len(candidates))
    limit = machine.memory_bytes * (1 - RESERVE)
    try:
        for choice in progress(candidates):
            found.tried += 1
            try:
                candidate = configure(config, choice)
                plan = Plan(choice, candidate, estimate(candidate, gpus, machine, gpus_per_node))
            except ConfigError as error:
                found.refused += 1
                found.refusal = found.refusal or str(error)
                continue
            if found.least is None or plan.estimate.peak < found.least.estimate.peak:
                found.least = plan
            if plan.estimate.peak > limit:
                found.too_large += 1
            else:
                found.fitting.append(plan)
    except KeyboardInterrupt:
        found.stopped = True
    return found


def explain(found: Search) -> list[str]:
    """For each field of the best choice that the model has, how the best plan with another value compares."""
    best, *others = found.ranked()
    speed = best.estimate.tokens_per_second
    lines = []
    of_experts = () if best.config.model.num_experts else ("ep", "dispatcher")
    for name, value in dataclasses.asdict(best.choice).items():
        if name in of_experts:
            continue
        rivals = [plan for plan in others if getattr(plan.choice, name) != value]
        if not rivals:
            lines.append(f"{name} {value}: no plan with another value was found that fits")
            continue
        rival = rivals[0]
        share = rival.estimate.tokens_per_second / speed
        why = f"the best with another value ({getattr(rival.choice, name)}) "
        if share > EQUAL:
            more = (rival.estimate.peak - best.estimate.peak) / GIB
            why += f"is as fast and needs {abs(more):.1f} GiB {'more' if more >= 0 else 'less'}"
        else:
            why += f"reaches {share:.1%} of its tokens/s{_slower_by(best, rival)}"
        lines.append(f"{name} {value}: {why}")
    return lines


def _slower_by(best: Plan, rival: Plan) -> str:
    """The part of the step that costs the rival most and, if relevant, the one that saves it most."""
    mine, theirs = dataclasses.asdict(best.estimate.time), dataclasses.asdict(rival.estimate.time)
    more = {name.replace("_", " "): theirs[name] - mine[name] for name in mine}
    cost, saving = max(more, key=lambda name: more[name]), min(more, key=lambda name: more[name])
    if more[cost] <= 1.05 * sum(more.values()):
        return f", most of it by {cost}: {_seconds(more[cost])} more per step"
    return f": {_seconds(more[cost])} more per step by {cost}, {_seconds(-more[saving])} less by {saving}"


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 0.1 else f"{value * 1e3:.2g} ms"
