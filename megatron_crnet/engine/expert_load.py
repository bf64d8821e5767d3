"""How evenly routers have given tokens to experts, summed over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_crnet.config.schema import Config
from megatron_crnet.model.experts import CountingRouter
from megatron_crnet.model.gpt import CRNetModel

Counts = list[tuple[Tensor, Tensor]]
"""What each router of this rank has counted: tokens per expert, and load-balancing losses."""


def counts_so_far(chunks: Sequence[CRNetModel]) -> Counts:
    """For a step that may be skipped, or the model of the next phase; empty without experts."""
    return [(router.tokens_per_expert, router.balance_loss) for _, router in _routers(chunks)]


def go_on_from(counts: Counts, chunks: Sequence[CRNetModel]) -> None:
    """Have routers count on from `counts_so_far`, of this model or another one in the same layout."""
    for (_, router), counted in zip(_routers(chunks), counts, strict=True):
        router.tokens_per_expert, router.balance_loss = counted


def _routers(chunks: Sequence[CRNetModel]) -> Iterator[tuple[int, CountingRouter]]:
    """Of this rank's layers with experts, each with the layer's index."""
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        if layer.experts is not None:
            yield layer.index, layer.experts.router


def routing_totals(
    chunks: Sequence[CRNetModel], device: torch.device, before: Sequence[Sequence[float]] | None = None
) -> Tensor:
    """What routers have counted since the last call, [layers, experts + 1] in fp64; a collective call.

    Tokens that each expert was given, then the load-balancing losses of all micro-batches, without their coefficient.

    Args:
        before: of an earlier call, to which this one's are added.
    """
    config = chunks[0].config
    totals = torch.zeros(config.num_layers, config.table.num_experts + 1, dtype=torch.float64, device=device)
    for index, router in _routers(chunks):
        totals[index, :-1], totals[index, -1:] = router.tokens_per_expert, router.balance_loss
        router.reset_counts()
    dist.all_reduce(totals)  # tensor-parallel ranks have counted their parts of the sequence
    return totals if before is None else totals + totals.new_tensor(before)


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
