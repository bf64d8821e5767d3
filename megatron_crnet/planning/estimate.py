"""What a configuration needs on every pipeline stage, and how long a step takes on a named machine, from formulas.

Memory, operations and bytes are checked against `planning/simulation.py` and real runs; the time is a roofline, whose
assumptions docs/planning.md lists.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_crnet.config.batch import BatchPlan, plan_batches
from megatron_crnet.config.model_size import flops_per_token
from megatron_crnet.config.schema import Config
from megatron_crnet.planning.figures import Flow, Memory, node_crossings
from megatron_crnet.planning.machines import Machine
from megatron_crnet.planning.memory import estimate_memory
from megatron_crnet.planning.operations import Operations, estimate_operations
from megatron_crnet.planning.roofline import StepTime, estimate_time
from megatron_crnet.planning.shards import LocalModel, build_local_models
from megatron_crnet.planning.traffic import estimate_flows

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class StageEstimate:
    """One rank of a pipeline stage; its tensor- and data-parallel peers are alike."""

    memory: Memory
    operations: Operations
    flows: list[Flow]


@dataclass(frozen=True)
class Estimate:
    """A whole run's step.

    Attributes:
        stages: by pipeline rank.
        model_flops: useful operations of a step over all ranks (`arithmetic.flops_per_token`: attention's causal
            half, no recomputation).
        crossings: of each kind of group, the share of its bytes that leaves a node (`figures.node_crossings`).
        time: on the machine, where one was named.
        dtype: of the products, `training.dtype`.
    """

    plan: BatchPlan
    world_size: int
    stages: list[StageEstimate]
    model_flops: float
    model_flops_whole_attention: float
    crossings: dict[str, float]
    time: StepTime | None
    dtype: str

    @property
    def fullest(self) -> int:
        """The pipeline rank that needs the most memory."""
        return max(range(len(self.stages)), key=lambda rank: self.stages[rank].memory.total)

    @property
    def tokens_per_second(self) -> float:
        """Of the whole run."""
        assert self.time is not None
        return self.plan.tokens_per_step / self.time.total

    def utilization(self, machine: Machine, whole_attention: bool = False) -> float:
        """Model FLOPs utilization: useful operations as a share of what the GPUs could do meanwhile.

        Args:
            whole_attention: see `arithmetic.flops_per_token`.
        """
        assert self.time is not None
        useful = self.model_flops_whole_attention if whole_attention else self.model_flops
        return useful / (self.time.total * self.world_size * machine.peak(self.dtype))


def estimate(
    config: Config, world_size: int, machine: Machine | None = None, gpus_per_node: int = GPUS_PER_NODE
) -> Estimate:
    """The figures of a step on `world_size` ranks.

    Raises:
        ConfigError: the batch or the layout does not fit `world_size` ranks.
    """
    plan = plan_batches(config, world_size)
    models = build_local_models(config)
    stages = [_stage(model, plan) for model in models]
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    crossings = node_crossings(tp, pp, plan.dp_size, gpus_per_node)
    time = None
    if machine is not None:
        parts = [(m, stage.memory, stage.operations, stage.flows) for m, stage in zip(models, stages, strict=True)]
        time = estimate_time(parts, plan, machine, crossings)
    useful, whole = (
        flops_per_token(config.model, plan.seq_length, whole_attention) * plan.tokens_per_step
        for whole_attention in (False, True)
    )
    return Estimate(plan, world_size, stages, useful, whole, crossings, time, config.training.dtype)


def _stage(model: LocalModel, plan: BatchPlan) -> StageEstimate:
    return StageEstimate(estimate_memory(model, plan), estimate_operations(model, plan), estimate_flows(model, plan))
