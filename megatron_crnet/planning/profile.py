"""What a step holds, sends and computes on one rank: by formula, simulated, or counted in a real run."""

from __future__ import annotations

from dataclasses import dataclass

TENSOR, PIPELINE, DATA, MODEL, STAGE, WORLD = "TP", "PP", "DP", "TP x PP", "TP x DP", "world"
"""Groups of ranks by what they are for. The last three carry a few numbers per step: norm, sizes of outputs, loss."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    The first four parts, the state, exist all through a step. While micro-batches pass, `kept` and `transient` come on
    top; when gradients are reduced, `reduction`; when the optimizer steps, `update`.

    Attributes:
        weights: parameters as the passes use them.
        gradients: where they are summed up over micro-batches.
        optimizer: fp32 master weights and Adam's moments.
        buffers: what Megatron-Core and DeepSpeed keep for communication.
        kept: activations that wait for backward, of all micro-batches in flight.
        transient: the most that comes on top of `kept`: a layer's inner tensors, logits, gradients of activations,
            weights that ZeRO-3 has gathered. Below 0 with one micro-batch whose `gradients`, which count in full, come
            only as `kept` goes.
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
class CommVolume:
    """Collective calls, or messages, of one kind in one group during a step.

    Attributes:
        kind: all_gather, reduce_scatter, all_reduce or send.
        group: which ranks take part, one of the names above.
        size: how many.
        bytes: volume of this rank (see `planning/counters.py`). For `send` what it sends, whatever it receives.
        calls: how many; None in an estimate.
    """

    kind: str
    group: str
    size: int
    bytes: int
    calls: int | None = None

    @property
    def wire_bytes(self) -> float:
        """What the rank puts on the wire by the usual ring algorithms: (n - 1) / n of the volume."""
        return float(self.bytes) if self.kind == "send" else self.bytes * (self.size - 1) / self.size


@dataclass(frozen=True)
class StepProfile:
    """One rank's step.

    Attributes:
        flops: floating-point operations of matrix products and attention as PyTorch's counter counts them
            (attention without the causal mask), recomputation included.
    """

    memory: Memory
    flows: list[CommVolume]
    flops: int
