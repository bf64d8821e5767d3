"""Counters of a step that really runs, or runs on fake tensors: bytes alive, calls, floating-point operations.

Conventions for communication, as in docs/parallelism.md: the volume of an all-gather is its output, that of a
reduce-scatter its input, an all-reduce counts as both. What a rank puts on the wire is (t - 1)/t of that for a group of
t ranks.
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
    "broadcast_": "broadcast",
    "send": "send",
}
"""Kinds of PyTorch's operations; others count under their own names."""


class Counter(TorchDispatchMode):
    """Observes every operation while it is active."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.observe(func, args, kwargs, out)
        return out

    def observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Take note of an operation that has run."""
        raise NotImplementedError


class Counters(Counter):
    """Several counters behind one mode: each mode of its own would cost every operation a turn in Python."""

    def __init__(self, *counters: Counter) -> None:
        super().__init__()
        self.counters = list(counters)

    def observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Pass it on."""
        if func is not torch.ops.prim.device.default:  # half of what a simulation dispatches, and does nothing
            for counter in self.counters:
                counter.observe(func, args, kwargs, out)


class LiveMemory(Counter):
    """Follows the storages that operations create until they are freed.

    Attributes:
        current: bytes alive now.
        peak: largest `current` since the last `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: dict[int, Any] = {}

    def reset_peak(self) -> None:
        """Start a new peak from what is alive now."""
        self.peak = self.current

    def observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Follow what an operation has created."""
        # an operation may return its input, which is followed already or was there before this counter
        before = {id(x.untyped_storage()) for x in tensors_in((args, kwargs))}
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            # DeepSpeed notes shapes in tensors on "meta", which have a size and no memory
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
    """Calls of one kind in one group; `elements` and `bytes` are volumes by the conventions above."""

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
        # an argument is a tensor, a list of them, or for each of them a list by rank: the larger of output and input
        counted = max((list(tensors_in(value)) for value in args), key=lambda side: sum(t.numel() for t in side))
        factor = 2 if kind == "all_reduce" else 1
        entry = self.traffic[kind, _ranks(args)]
        entry.calls += 1
        entry.elements += factor * sum(t.numel() for t in counted)
        entry.bytes += factor * sum(t.numel() * t.element_size() for t in counted)

    def total(self, *kinds: str, ranks: tuple[int, ...] | None = None) -> Traffic:
        """Traffic of some kinds, in one group or in all."""
        found = [t for (kind, group), t in self.traffic.items() if kind in kinds and ranks in (None, group)]
        return Traffic(*(sum(getattr(t, name) for t in found) for name in ("calls", "elements", "bytes")))


def _ranks(args: Any) -> tuple[int, ...]:
    for value in args:
        if isinstance(value, torch.ScriptObject):
            try:
                return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(value)))
            except (RuntimeError, TypeError):
                continue  # the reduction's operator
    return ()


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter with the CPU's attention kernels, of the same shapes as CUDA's, which alone it counts."""

    def forward(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    aten: Any = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=attention)


class OperationCounter(Counter):
    """Counts what `flop_counter` counts, without keeping alive what passes through modules."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas = flop_counter().flop_registry

    def observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count an operation that PyTorch has a formula for."""
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results, in lists, tuples and dictionaries as they come."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
