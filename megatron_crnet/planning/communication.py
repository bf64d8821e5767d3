"""Counts what a real run sends: every collective call and every message between pipeline stages.

Conventions, as in docs/parallelism.md: the volume of an all-gather is its output, that of a reduce-scatter its
input, an all-reduce counts as both. What a rank puts on the wire is (t - 1)/t of that for a group of t ranks.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_crnet.planning.live_memory import tensors_in

# other operations are counted under their own names
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


@dataclass
class Traffic:
    """Calls of one kind in one group.

    Attributes:
        elements: volume by the conventions above.
        bytes: the same in bytes.
    """

    calls: int = 0
    elements: int = 0
    bytes: int = 0


class CommunicationCounter(TorchDispatchMode):
    """Counts on this rank while it is active; `traffic` is by (kind, ranks of the group)."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic: dict[tuple[str, tuple[int, ...]], Traffic] = defaultdict(Traffic)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.observe(func, args, kwargs, out)
        return out

    def observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count an operation if it communicates."""
        if func.namespace == "c10d":
            self._count(func._opname, args)

    def _count(self, name: str, args: Any) -> None:
        kind = KINDS.get(name, name)
        # an argument is a tensor, a list of them, or for each of them a list by rank: the larger of output and input
        sides = [list(tensors_in(value)) for value in args]
        counted = max(sides, key=lambda side: sum(t.numel() for t in side))
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
