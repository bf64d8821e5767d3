"""Experts that are spread over replicas, for DeepSpeed: which groups reduce them, and the norm of all gradients.

DeepSpeed reduces and partitions what is marked `allreduce = False` over a group of its own, if the model has a layer of
its class `MoE`, from which it asks for the groups. Here these are Megatron-Core's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.utils import clip_tensors_by_global_norm, get_global_norm_of_tensors, get_norm_with_moe_layers
from deepspeed.utils import groups
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from torch import nn

from megatron_crnet.config.experts_rules import spans_replicas
from megatron_crnet.config.schema import Config
from megatron_crnet.distributed.process_groups import MegatronMpu
from megatron_crnet.model.gpt import CRNetModel

SPREAD = "ep_size_0"
"""DeepSpeed's name of the groups, which it expects to end in a number."""


class SpreadExperts(MoE):
    """Tells DeepSpeed that experts differ between replicas, and over which ranks; it holds none and computes nothing.

    Args:
        chunks: this rank's model chunks, whose experts' parameters are given the name of the groups.
    """

    def __init__(self, config: Config, chunks: Sequence[CRNetModel]) -> None:
        nn.Module.__init__(self)  # DeepSpeed's own would build a gate and experts
        self.num_experts = config.model.num_experts
        for parameter in (p for chunk in chunks for p in chunk.parameters() if is_moe_param(p)):
            parameter.group_name = SPREAD

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed's engine: hand over the groups."""
        groups._get_expert_parallel_group_dict()[SPREAD] = parallel_state.get_expert_model_parallel_group()
        groups._get_expert_data_parallel_group_dict()[SPREAD] = parallel_state.get_expert_data_parallel_group()


def spread_experts(config: Config, chunks: Sequence[CRNetModel]) -> list[nn.Module]:
    """A `SpreadExperts` where the configuration spreads experts over replicas, else nothing."""
    return [SpreadExperts(config, chunks)] if spans_replicas(config.parallel) else []


def forget_groups() -> None:
    """Take back what `SpreadExperts` has handed over, before the groups are destroyed."""
    groups._get_expert_parallel_group_dict().pop(SPREAD, None)
    groups._get_expert_data_parallel_group_dict().pop(SPREAD, None)


def clip_with_experts(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Clip gradients by their norm over all ranks, of which each expert and each copied weight counts once.

    DeepSpeed's `clip_grad_norm_` averages norms over replicas, which is the norm only where these are alike.

    Args:
        parameters: all of this rank, with reduced gradients where they are trained.

    Returns:
        The norm; infinite where a gradient is not finite.
    """
    parameters = [p for p in parameters if p.requires_grad]
    own = [p for p in parameters if not hasattr(p, PIPE_REPLICATED)]
    dense = [p.grad for p in own if not is_moe_param(p) and param_is_not_tensor_parallel_duplicate(p)]
    experts = [p.grad for p in own if is_moe_param(p)]
    of_dense = get_global_norm_of_tensors(dense, mpu=MegatronMpu())
    found = get_norm_with_moe_layers(of_dense, MegatronMpu(), {SPREAD: experts})
    norm = torch.tensor(found if found >= 0 else math.inf, device=of_dense.device)  # -1 is DeepSpeed's sign of that
    # other sums on other replicas could round otherwise, and copies of a weight would drift apart
    dist.all_reduce(norm, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    if norm.isfinite():
        clip_tensors_by_global_norm([p.grad for p in parameters], max_norm=limit, global_norm=norm)
    return float(norm)
