"""Memory, operations and traffic of every pipeline stage, and the time of a step, by formula.

Checked against simulated and real ranks (`planning/counted_step.py`): memory and communication to 10%, operations
exactly. The time is a roofline; docs/planning.md lists its assumptions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

from megatron_crnet.config.batch import BatchPlan, plan_batches
from megatron_crnet.config.model_size import flops_per_token
from megatron_crnet.config.phases import Phase, planned_phases, with_largest_ranks
from megatron_crnet.config.schema import Config
from megatron_crnet.planning.machines import MACHINES, Machine
from megatron_crnet.planning.memory import estimate_memory
from megatron_crnet.planning.profile import CommVolume, Crossing, Memory, Peers
from megatron_crnet.planning.roofline import Operations, StepTime, estimate_operations, estimate_time
from megatron_crnet.planning.shards import build_local_models
from megatron_crnet.planning.volume import estimate_volumes

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class StageEstimate:
    """One rank of a pipeline stage; its tensor- and data-parallel peers are equal."""

    memory: Memory
    operations: Operations
    flows: list[CommVolume]


@dataclass(frozen=True)
class Estimate:
    """A step of a run.

    Attributes:
        config: of the run; of ranks that change, the largest.
        stages: by pipeline rank.
        crossings: by kind of group, the shares of bytes that cross nodes.
        time: of the slowest stage.
        steps: of the run that are like this one.
        others: phases of other steps, with an estimate of such a step: ReLoRA's warm start, other ranks.
    """

    config: Config
    plan: BatchPlan
    world_size: int
    machine: Machine
    stages: list[StageEstimate]
    crossings: dict[str, Crossing]
    time: StepTime
    steps: int
    others: tuple[tuple[Phase, Estimate], ...] = ()

    @property
    def fullest(self) -> int:
        """The pipeline rank that needs the most memory."""
        return max(range(len(self.stages)), key=lambda rank: self.stages[rank].memory.total)

    @property
    def peak(self) -> int:
        """Peak bytes of that rank, or of other steps if these need more."""
        return max(self.stages[self.fullest].memory.total, *(step.peak for _, step in self.others), 0)

    @property
    def run_seconds(self) -> float:
        """Of all steps of the run."""
        others = sum((phase.stop - phase.start) * step.time.total for phase, step in self.others)
        return self.steps * self.time.total + others

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all ranks."""
        return self.plan.tokens_per_step / self.time.total

    def model_flops(self, whole_attention: bool = False) -> float:
        """Useful operations of a step over all ranks; see `flops_per_token`."""
        return flops_per_token(self.config.model, self.plan.seq_length, whole_attention) * self.plan.tokens_per_step

    def utilization(self, whole_attention: bool = False) -> float:
        """Model FLOPs utilization."""
        possible = self.time.total * self.world_size * self.machine.peak(self.config.training.dtype)
        return self.model_flops(whole_attention) / possible


def estimate(
    config: Config, world_size: int, machine: Machine = MACHINES["h100"], gpus_per_node: int = GPUS_PER_NODE
) -> Estimate:
    """Estimate a step on `world_size` ranks: after a warm start, and with the largest ranks of a schedule.

    Raises:
        ConfigError: the batch or the layout does not fit `world_size` ranks.
    """
    phases, config = planned_phases(config), with_largest_ranks(config)
    others = [phase for phase in phases if phase.config.model != config.model]
    plan = plan_batches(config, world_size)
    models = build_local_models(config)
    ep = config.parallel.expert_model_parallel_size
    crossings = node_crossings(models[0].tp, models[0].pp, plan.dp_size, gpus_per_node, ep)
    stages = [
        StageEstimate(estimate_memory(m, plan, machine.is_gpu), estimate_operations(m, plan), estimate_volumes(m, plan))
        for m in models
    ]
    times = [
        estimate_time(model, plan, machine, stage.memory, stage.operations, stage.flows, crossings)
        for model, stage in zip(models, stages, strict=True)
    ]
    slowest = max(times, key=lambda time: time.total)
    steps = config.training.train_steps - sum(phase.stop - phase.start for phase in others)
    estimated = tuple((phase, estimate(phase.config, world_size, machine, gpus_per_node)) for phase in others)
    return Estimate(config, plan, world_size, machine, stages, crossings, slowest, steps, estimated)


@cache  # a search asks for the same layout many times
def node_crossings(tp: int, pp: int, dp: int, gpus_per_node: int, ep: int = 1) -> dict[str, Crossing]:
    """By kind of group, the shares of bytes between nodes.

    Rings follow the order of ranks, which vary in tp first, then dp, then pp, and fill the nodes in order.
    """
    world = tp * pp * dp

    def crossing(size: int, stride: int) -> Crossing:
        edges = pairs = 0
        for first in (rank for rank in range(world) if rank // stride % size == 0):
            nodes = [(first + i * stride) // gpus_per_node for i in range(size)]
            edges += sum(one != following for one, following in zip(nodes, [*nodes[1:], nodes[0]], strict=True))
            pairs += sum(count * (size - count) for count in Counter(nodes).values())
        return Crossing(edges / world, pairs / world / max(size - 1, 1))

    groups = {Peers.TENSOR: (tp, 1), Peers.DATA: (dp, tp), Peers.PIPELINE: (pp, tp * dp), Peers.STAGE: (tp * dp, 1)}
    groups |= {Peers.EXPERT: (ep, 1), Peers.EXPERT_DATA: (tp * dp // ep, ep)}
    ends = float(tp * dp * (pp - 1) >= gpus_per_node)
    return {**{name: crossing(*sizes) for name, sizes in groups.items()}, Peers.EMBEDDING: Crossing(ends, ends)}
