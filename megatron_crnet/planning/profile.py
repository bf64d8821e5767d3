"""Memory, traffic and operations of one rank in a step: by formula, simulated, or counted in a real run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Peers(StrEnum):
    """Names of process groups.

    EMBEDDING is the first and the last of three or more pipeline stages, of two PIPELINE. EXPERT and EXPERT_DATA, over
    which experts are spread and the ranks with copies of them, are named where these are none of the other groups.
    MODEL, STAGE and WORLD reduce a few scalars per step; in STAGE GaLore also exchanges matrices, and experts take
    tokens.
    """

    TENSOR, PIPELINE, DATA, EMBEDDING = "TP", "PP", "DP", "first+last"
    EXPERT, EXPERT_DATA = "EP", "EP's DP"
    MODEL, STAGE, WORLD = "TP x PP", "TP x DP", "world"


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    The first four parts, the state, exist throughout a step. The passes add `kept` and `transient`, the reduction of
    gradients `reduction`, the optimizer `update`.

    Attributes:
        weights: parameters in the training precision.
        gradients: accumulated over micro-batches.
        optimizer: fp32 master weights and Adam's moments.
        buffers: communication buffers of Megatron-Core and DeepSpeed.
        kept: activations saved for backward, of all micro-batches in flight.
        transient: the peak on top of `kept`: a layer's inner tensors, logits, gradients of activations, weights
            gathered by ZeRO-3. Negative where a single micro-batch frees `kept` while it allocates `gradients`.
        reduction: flat copies while gradients are summed over ranks.
        update: temporary tensors of the optimizer.
        host: offloaded bytes in the host's memory, not part of the peak.
        start: whole weights, before the first step, which ZeRO-3 then partitions.
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
    start: int = 0

    @property
    def state(self) -> int:
        """Bytes that exist throughout a step."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    @property
    def total(self) -> int:
        """The peak of a step, or of the time before the first."""
        return max(self.start, self.state + max(self.kept + self.transient, self.reduction, self.update))

    @property
    def parts(self) -> dict[str, int]:
        """As benchmarks split it: what comes and goes with a step is `activations`, buffers included."""
        rest = self.buffers + max(self.kept + self.transient, self.reduction, self.update)
        state = {"weights": self.weights, "optimizer": self.optimizer, "gradients": max(self.gradients, 0)}
        return {**state, "activations": max(rest + min(self.gradients, 0), 0)}


@dataclass(frozen=True)
class CommVolume:
    """Collective calls or messages of one kind in one group in a step.

    Attributes:
        kind: all_gather, reduce_scatter, all_reduce, all_to_all or send.
        group: one of the names above.
        size: ranks of the group.
        bytes: volume of this rank (see `planning/counters.py`), for `send` only what it sends.
        calls: None in an estimate.
    """

    kind: str
    group: str
    size: int
    bytes: int
    calls: int | None = None

    @property
    def wire_bytes(self) -> float:
        """Bytes sent: by a ring algorithm (n - 1) / n of the volume, in messages and exchanges all."""
        return float(self.bytes) if self.kind in ("send", "all_to_all") else self.bytes * (self.size - 1) / self.size


@dataclass(frozen=True)
class Crossing:
    """Shares of what the ranks of a group send that go to other nodes, as means over all ranks.

    Attributes:
        ring: where each sends to the next one, as all calls but exchanges do.
        exchange: where each sends as much to every other one.
    """

    ring: float
    exchange: float

    def of(self, kind: str) -> float:
        """That of a kind of call."""
        return self.exchange if kind == "all_to_all" else self.ring


@dataclass(frozen=True)
class StepProfile:
    """One rank's step.

    Attributes:
        flops: operations of matrix products and attention (without the causal mask), recomputation included.
    """

    memory: Memory
    flows: list[CommVolume]
    flops: int
