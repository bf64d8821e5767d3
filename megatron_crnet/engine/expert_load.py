"""How evenly routers have given tokens to experts, summed over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_crnet.config.schema import Config
from megatron_crnet.model.gpt import CRNetModel


def routing_totals(chunks: Sequence[CRNetModel], device: torch.device) -> Tensor:
    """What routers have counted since the last call, [layers, experts + 1] in fp64; a collective call.

    Tokens that each expert was given, then the load-balancing losses of all micro-batches, without their coefficient.
    """
    config = chunks[0].config
    totals = torch.zeros(config.num_layers, config.table.num_experts + 1, dtype=torch.float64, device=device)
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        router = layer.experts.router
        totals[layer.index, :-1], totals[layer.index, -1:] = router.tokens_per_expert, router.balance_loss
        router.reset_counts()
    dist.all_reduce(totals)  # tensor-parallel ranks have counted their parts of the sequence
    return totals


def load_metrics(totals: Tensor, config: Config) -> dict[str, float]:
    """For logs: the load-balancing loss, and the fullest and emptiest expert of any layer, by their share.

    Args:
        totals: of `routing_totals`.
    """
    training, tokens = config.training, totals[:, :-1]
    micro_batches = tokens[0].sum() / (config.model.moe_router_topk * training.micro_batch_size * training.seq_length)
    shares = tokens / tokens.mean(1, keepdim=True)
    found = {"expert_load_max": float(shares.max()), "expert_load_min": float(shares.min())}
    if config.model.moe_aux_loss_coeff > 0:
        found["load_balancing_loss"] = float(totals[:, -1].mean() / micro_batches)
    return found
