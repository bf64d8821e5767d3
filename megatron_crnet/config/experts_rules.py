"""Rules on the experts of a mixture (`model.num_experts` and what belongs to it)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_crnet.config.architectures import ARCHITECTURES
from megatron_crnet.config.positions import METHODS
from megatron_crnet.utils.errors import require

if TYPE_CHECKING:
    from megatron_crnet.config.schema import Config, ModelConfig


def check_experts(model: ModelConfig) -> None:
    """An architecture with experts has some, and only such a one has.

    Raises:
        ConfigError: for the first rule that is broken.
    """
    experts, topk = model.num_experts, model.moe_router_topk
    if ARCHITECTURES[model.architecture].experts is None:
        changed = [name for name in model.changed() if name == "num_experts" or name.startswith("moe_")]
        require(
            not changed,
            f"model.{changed[0] if changed else ''} is set, but architecture {model.architecture} has no experts: "
            "leave it out, or use qwen3_moe",
        )
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
    require(
        not METHODS[model.variant].has_frozen,
        f"model.variant is {model.variant}, whose restarts are not built for the stacked weights of experts: use "
        "another variant, or architecture qwen3",
    )


def check_counted_by_shapes(model: ModelConfig, instead: str) -> None:
    """What follows from shapes alone can be counted of the model.

    Args:
        instead: the remedy.

    Raises:
        ConfigError: it has experts.
    """
    require(
        model.num_experts is None,
        f"model.num_experts is {model.num_experts}, but which expert a token is given to follows from values, which "
        f"tensors without memory do not have: {instead}",
    )


def check_expert_parallel(config: Config) -> None:
    """Experts can be spread over ranks as asked, and every optimizer knows their weights.

    Raises:
        ConfigError: for the first rule that is broken.
    """
    parallel, experts = config.parallel, config.model.num_experts
    size, tp = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    name = "parallel.expert_model_parallel_size"
    if experts is None:
        require(size == 1, f"{name} {size} needs a model with experts (architecture qwen3_moe): leave it out")
        return
    require(
        config.optimizer.name != "galore",
        "optimizer.name is galore, which projects single matrices, but the weights of experts are stacks of them: use "
        "adamw or adamw8bit",
    )
    require(
        config.distillation.teacher is None,
        "distillation.teacher is set, but beside a model with experts no teacher has been tried: leave it out, or use "
        "architecture qwen3",
    )
    require(
        tp == 1 or parallel.shards_sequence,
        f"parallel.sequence_parallel is false with parallel.tensor_model_parallel_size {tp}, but each rank gives the "
        "tokens of its own part of the sequence to experts, as in Megatron-Core: leave sequence_parallel out",
    )
    require(
        size in (1, tp),
        f"{name} is {size}, but experts are spread over tensor-parallel ranks, of which there are {tp}; over replicas, "
        "ZeRO would have to partition them apart from all other weights: use "
        f"{'1' if tp == 1 else f'1 or {tp}'}, or tensor_model_parallel_size {size}",
    )
    require(
        experts % size == 0,
        f"model.num_experts {experts} does not divide by {name} {size}: use {experts // size * size or size} or "
        f"{(experts // size + 1) * size}, or another size",
    )
