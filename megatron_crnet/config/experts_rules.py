"""Rules on the experts of a mixture (`model.num_experts` and what belongs to it)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_crnet.config.architectures import ARCHITECTURES
from megatron_crnet.config.deepspeed import offloads_optimizer, zero_stage
from megatron_crnet.utils.errors import multiples_near, require

if TYPE_CHECKING:
    from megatron_crnet.config.megatron import CRNetTransformerConfig
    from megatron_crnet.config.parallel_section import ParallelConfig
    from megatron_crnet.config.schema import Config, ModelConfig


def check_experts(model: ModelConfig) -> None:
    """An architecture with experts has some.

    Raises:
        ConfigError: for the first rule that is broken.
    """
    experts, topk = model.num_experts, model.moe_router_topk
    if ARCHITECTURES[model.architecture].experts is None:
        return
    require(
        experts is not None, f"model.num_experts is not set, but architecture {model.architecture} needs it: set it"
    )
    assert experts is not None
    require(
        topk <= experts,
        f"model.moe_router_topk {topk} is above model.num_experts {experts}: use at most that",
    )
    require(
        topk > 1 or model.moe_router_pre_softmax,
        "model.moe_router_topk is 1, and the softmax over one expert is 1, which teaches the router nothing: set "
        "moe_router_pre_softmax, or use at least 2",
    )


def spans_replicas(sizes: ParallelConfig | CRNetTransformerConfig) -> bool:
    """Whether several replicas hold one copy of the experts between them."""
    return sizes.expert_model_parallel_size > sizes.tensor_model_parallel_size


def check_expert_parallel(config: Config) -> None:
    """Experts can be spread over ranks as asked, and every optimizer knows their weights.

    Raises:
        ConfigError: for the first rule that is broken.
    """
    parallel, experts = config.parallel, config.model.num_experts
    size, tp = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    name = "parallel.expert_model_parallel_size"
    if experts is None:
        return
    require(
        config.optimizer.name != "galore" or size == tp == 1,
        f"optimizer.name is galore, which brings the parts of each matrix to one rank, but with {name} {size} and "
        f"parallel.tensor_model_parallel_size {tp} ranks hold copies of experts or none of them: use 1 for both, or "
        "adamw",
    )
    require(
        tp == 1 or parallel.shards_sequence,
        f"parallel.sequence_parallel is false with parallel.tensor_model_parallel_size {tp}, but each rank gives the "
        "tokens of its own part of the sequence to experts, as in Megatron-Core: leave sequence_parallel out",
    )
    require(
        size == 1 or size % tp == 0,
        f"{name} is {size}, but experts are spread over all {tp} tensor-parallel ranks of one replica or of several: "
        f"use 1 or a multiple of {tp}",
    )
    require(
        experts % size == 0,
        f"model.num_experts {experts} does not divide by {name} {size}: use {multiples_near(experts, size)}, "
        "or another size",
    )
    if spans_replicas(parallel):
        _check_over_replicas(config)


def _check_over_replicas(config: Config) -> None:
    """DeepSpeed knows experts that differ between replicas under ZeRO 0 and 1 (`engine/expert_parallel.py`)."""
    parallel, stage = config.parallel, zero_stage(config)
    spread = (
        f"parallel.expert_model_parallel_size {parallel.expert_model_parallel_size} is above "
        f"tensor_model_parallel_size {parallel.tensor_model_parallel_size}, which spreads experts over replicas, "
    )
    require(
        stage <= 1,
        f"{spread}but DeepSpeed partitions gradients of zero_optimization.stage {stage} over all replicas alike: use "
        "stage 0 or 1",
    )
    require(
        stage == 1 or not config.training.bf16,
        f"{spread}but at stage 0 DeepSpeed's bf16 wrapper averages the gradient norms of different experts: use stage "
        "1",
    )
    require(
        not offloads_optimizer(config),
        f"{spread}but DeepSpeed's host copies of gradients know one group of replicas alone: leave "
        "zero_optimization.offload_optimizer out",
    )
    for key in ("contiguous_gradients", "reduce_scatter"):
        require(
            bool(config.deepspeed.get("zero_optimization", {}).get(key, True)),
            f"{spread}but with zero_optimization.{key} false DeepSpeed sums their gradients over all replicas: leave "
            f"{key} out",
        )


def check_expert_replicas(config: Config, dp_size: int) -> None:
    """Experts that are spread over replicas find as many as they need.

    Args:
        dp_size: data-parallel ranks.

    Raises:
        ConfigError: they do not.
    """
    size, tp = config.parallel.expert_model_parallel_size, config.parallel.tensor_model_parallel_size
    each, name = max(size // tp, 1), "parallel.expert_model_parallel_size"
    require(
        dp_size % each == 0,
        f"{name} {size} spreads experts over {each} replicas, but the {dp_size} data-parallel ranks are no multiple of "
        f"that: use {name} {math.gcd(dp_size, each) * tp}, or a multiple of {each * tp} processes for each pipeline "
        "stage",
    )
