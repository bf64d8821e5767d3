"""Counters of live bytes, communication and floating-point operations, for real and fake tensors.

Communication volume, as in docs/parallelism.md: the output of an all-gather, the input of a reduce-scatter, both for an
all-reduce, of which a rank of a group of t ranks sends (t - 1)/t; of an all-to-all what leaves the rank or comes to it.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
}
"""Kinds of PyTorch's operations; others keep their names."""


class Counter(TorchDispatchMode):
    """Intercepts every operation while it is active; compiled regions run as they are (`model/compiled.py`)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.observe(func, args, kwargs, out)
        return out

    def observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Process an operation after it has run."""
        raise NotImplementedError


class Counters(Counter):
    """Several counters in one dispatch mode, which is faster than a mode for each."""

    def __init__(self, *counters: Counter) -> None:
        super().__init__()
        self.counters = list(counters)

    def observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Forward to each counter."""
        if func is not torch.ops.prim.device.default:  # a query, half of the calls of a simulation
            for counter in self.counters:
                counter.observe(func, args, kwargs, out)


class LiveMemory(Counter):
    """Tracks the storages that operations create until they are freed.

    Attributes:
        current: bytes alive now.
        peak: largest `current` since the last `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: dict[int, Any] = {}

    def reset_peak(self) -> None:
        """Reset the peak to the current value."""
        self.peak = self.current

    def observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Track new storages."""
        # an operation may return its input
        before = {id(x.untyped_storage()) for x in tensors_in((args, kwargs))}
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            # DeepSpeed keeps shapes as "meta" tensors, which have no memory
            if id(storage) not in before and tensor.device.type != "meta":
                self._follow(storage)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._freed, key, size)
        self.current += size
        self.peak = max(self.peak, self.current)

    def _freed(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.current -= size


@dataclass
class Traffic:
    """Calls of one kind in one group, and their volumes."""

    calls: int = 0
    elements: int = 0
    bytes: int = 0


class CommunicationCounter(Counter):
    """Counts this rank's collective calls and messages; `traffic` is by (kind, ranks of the group)."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic: dict[tuple[str, tuple[int, ...]], Traffic] = defaultdict(Traffic)

    def observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count an operation if it communicates."""
        if func.namespace != "c10d":
            return
        kind = KINDS.get(func._opname, func._opname)
        # arguments are tensors or nested lists of them: the larger of output and input counts
        counted = max((list(tensors_in(value)) for value in args), key=lambda side: sum(t.numel() for t in side))
        factor = 2.0 if kind == "all_reduce" else 1.0
        if kind == "all_to_all":
            factor -= _own_share(counted[0], args)
        entry = self.traffic[kind, _ranks(args)]
        entry.calls += 1
        entry.elements += round(factor * sum(t.numel() for t in counted))
        entry.bytes += round(factor * sum(t.numel() * t.element_size() for t in counted))

    def total(self, *kinds: str, ranks: tuple[int, ...] | None = None) -> Traffic:
        """Traffic of some kinds, in one group or in all."""
        found = [t for (kind, group), t in self.traffic.items() if kind in kinds and ranks in (None, group)]
        return Traffic(*(sum(getattr(t, name) for t in found) for name in ("calls", "elements", "bytes")))


def _own_share(side: torch.Tensor, args: Any) -> float:
    """Of an all-to-all's output or input, what the rank sends to itself: `args` end in the sizes of both in rows."""
    ranks, splits = _ranks(args), args[4]
    own = ranks.index(dist.get_rank())
    return splits[own] / max(len(side), 1) if splits else 1 / len(ranks)


def _ranks(args: Any) -> tuple[int, ...]:
    for value in args:
        if isinstance(value, torch.ScriptObject):
            try:
                return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(value)))
            except (RuntimeError, TypeError):
                continue  # not a group
    return ()


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, extended by products in place, products of stacks, and the CPU's attention kernels."""

    def added(_: Any, one: Any, other: Any, **__: Any) -> int:
        return 2 * one[0] * one[1] * other[1]

    def stacked(one: Any, other: Any, *_: Any, **__: Any) -> int:
        # [tokens, in] with [experts, in, out], or for their gradient [out, tokens] with [tokens, in]
        return 2 * one[0] * one[1] * other[-1]

    def forward(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    aten: Any = torch.ops.aten
    formulas = {
        aten.addmm_: added,
        aten._grouped_mm: stacked,
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


class OperationCounter(Counter):
    """Counts like `flop_counter`, without keeping the inputs of modules alive."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas = flop_counter().flop_registry

    def observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count an operation with a known formula."""
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
