"""Which configurations run a micro-batch as a CUDA graph, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_crnet.config.deepspeed import offloads_optimizer, zero_stage
from megatron_crnet.utils.errors import require

if TYPE_CHECKING:
    from megatron_crnet.config.schema import Config

SWITCH = "training.cuda_graphs"


def uses_cuda_graphs(config: Config) -> bool:
    """Whether micro-batches run as CUDA graphs where the device is a GPU."""
    wanted = config.training.cuda_graphs
    return next(_obstacles(config), None) is None if wanted is None else wanted


def describe_launches(config: Config) -> str:
    """A line on how micro-batches are launched on a GPU, and why not as a graph."""
    if uses_cuda_graphs(config):
        return "the passes of a micro-batch are launched as a CUDA graph"
    why = f"{SWITCH} is false" if config.training.cuda_graphs is False else next(_obstacles(config))
    return f"the passes of a micro-batch are launched one operation after another, not as a CUDA graph: {why}"


def check_cuda_graphs(config: Config) -> None:
    """Refuse `training.cuda_graphs` true where a graph would not compute what the operations do.

    Raises:
        ConfigError: for the first obstacle.
    """
    obstacle = next(_obstacles(config), None)
    require(
        config.training.cuda_graphs is not True or obstacle is None,
        f"{SWITCH} is true, but {obstacle}: leave it out, or set it false",
    )


def _obstacles(config: Config) -> Iterator[str]:
    """What a graph cannot hold: work of the host, sizes that change, and collectives, which no test has seen in one."""
    stage, parallel = zero_stage(config), config.parallel
    if not (config.training.bf16 and stage == 1):
        yield (
            "gradients lie where a graph expects them only with training.dtype bf16 and ZeRO stage 1, not with "
            f"{config.training.dtype} and stage {stage}"
        )
    if offloads_optimizer(config):
        yield "deepspeed.zero_optimization.offload_optimizer moves gradients to the host"
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if getattr(parallel, name) > 1:
            yield f"it is for whole models on each rank, and parallel.{name} is {getattr(parallel, name)}"
    if config.recompute.traits.inverts:
        yield f"recompute.strategy {config.recompute.strategy} plans its segments anew in each step"
    if config.deepspeed.get("activation_checkpointing"):
        yield "deepspeed.activation_checkpointing moves activations by work of the host"
    timers = "timers" in config.deepspeed and config.deepspeed["timers"].get("throughput", {}).get("enabled", True)
    if timers or any(config.deepspeed.get(key) for key in ("wall_clock_breakdown", "memory_breakdown")):
        yield "DeepSpeed's timers and memory_breakdown wait for the device in each micro-batch"
    if config.model.hidden_dropout or config.model.attention_dropout:
        yield "dropout draws other numbers in each step"
    if config.data.reset_attention_mask:
        yield "data.reset_attention_mask is true, and documents have other lengths in each micro-batch"
    if config.model.num_experts:
        yield "tokens go to other experts in each micro-batch"
    if config.distillation.teacher is not None:
        yield "distillation counts its losses on the host"
