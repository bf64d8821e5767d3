"""What a step holds, sends and computes on one rank: the same figures from formulas, a simulated run or a real one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

TENSOR, PIPELINE, DATA, MODEL, STAGE, WORLD = "TP", "PP", "DP", "TP x PP", "TP x DP", "world"
"""Groups of ranks by what they are for. The last three carry a few numbers a step: norm, sizes of outputs, loss."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    The first five parts exist all through a step. While micro-batches pass, `kept` and `transient` come on top; when
    gradients are summed, `reduction`; when the optimizer steps, `update`.

    Attributes:
        weights: parameters as the passes use them.
        gradients: where they are summed up over micro-batches.
        optimizer: fp32 master weights and Adam's moments.
        buffers: what Megatron-Core and DeepSpeed keep for communication.
        kept: activations that wait for backward, of all micro-batches in flight.
        transient: the most that comes on top of `kept`: a layer's inner tensors, logits, gradients of activations.
            Below 0 with one micro-batch whose `gradients`, which count in full, come only as `kept` goes.
        reduction: flat copies while gradients are summed over ranks.
        update: temporary tensors of the optimizer.
        host: bytes in the host's memory instead, where something is offloaded; not part of the peak.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    kept: int
    transient: int
    reduction: int
    update: int
    host: int = 0

    @property
    def state(self) -> int:
        """What exists all the time."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    @property
    def total(self) -> int:
        """The peak of the step."""
        return self.state + max(self.kept + self.transient, self.reduction, self.update)


@dataclass(frozen=True)
class Flow:
    """Collective calls, or messages, of one kind in one group during a step; volumes as in `planning/communication.py`.

    Attributes:
        kind: all_gather, reduce_scatter, all_reduce or send.
        group: which ranks take part, one of the names above.
        size: how many.
        calls, bytes: of this rank. For `send` what it sends, whatever it receives.
    """

    kind: str
    group: str
    size: int
    calls: int
    bytes: int

    @property
    def wire_bytes(self) -> float:
        """What the rank puts on the wire by the usual ring algorithms: (n - 1) / n of the volume."""
        return float(self.bytes) if self.kind == "send" else self.bytes * (self.size - 1) / self.size


def merged(flows: Iterable[Flow]) -> list[Flow]:
    """One entry for each kind and group, without empty ones and without groups of one rank, in a fixed order."""
    found: dict[tuple[str, str, int], tuple[int, int]] = {}
    for flow in flows:
        key = flow.group, flow.kind, flow.size
        calls, volume = found.get(key, (0, 0))
        found[key] = calls + flow.calls, volume + flow.bytes
    return [
        Flow(kind, group, size, calls, volume)
        for (group, kind, size), (calls, volume) in sorted(found.items())
        if calls and size > 1
    ]


@cache  # a search asks for the same layout many times
def node_crossings(tp: int, pp: int, dp: int, gpus_per_node: int) -> dict[str, float]:
    """For each kind of group, the share of its rings' edges that lead from one node to another.

    A group's ring goes through its ranks in order and back; ranks count through tp first, then dp, then pp, and fill
    one node after the other. Every edge of a ring carries the same bytes, so this is also the share of its bytes.
    """
    strides = {"tp": (tp, 1), "dp": (dp, tp), "pp": (pp, tp * dp)}
    parts = {
        TENSOR: ("tp",),
        PIPELINE: ("pp",),
        DATA: ("dp",),
        MODEL: ("tp", "pp"),
        STAGE: ("tp", "dp"),
        WORLD: ("tp", "dp", "pp"),
    }
    nodes = [rank // gpus_per_node for rank in range(tp * pp * dp)]
    return {
        name: sum(nodes[rank] != nodes[_next(rank, [strides[part] for part in own])] for rank in range(len(nodes)))
        / len(nodes)
        for name, own in parts.items()
    }


def _next(rank: int, parts: list[tuple[int, int]]) -> int:
    """The rank after `rank` in the ring over parts of (size, distance), the narrowest first."""
    for size, stride in parts:
        position = rank // stride % size
        if position + 1 < size:
            return rank + stride
        rank -= position * stride
    return rank


@dataclass(frozen=True)
class StepFigures:
    """One rank's step.

    Attributes:
        flops: floating-point operations of matrix products and attention as PyTorch's counter counts them
            (attention without the causal mask), recomputation included.
    """

    memory: Memory
    flows: list[Flow]
    flops: int
