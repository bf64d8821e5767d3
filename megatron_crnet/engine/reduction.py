"""Sums of gradients beside those over replicas: of partial gradients, and of the copies of a tied weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_crnet.engine.zero_state import ZeroState


def sum_over_tied_copies(zero: ZeroState, copies: Sequence[nn.Parameter]) -> None:
    """Sum the gradients of the embedding on the first and of its copy on the last pipeline stage, to the same bits.

    How replicas round a sum follows from where a weight lies in a bucket, which differs between the stages, so
    theirs comes first. Where it leaves a rank shards, which the stages cut elsewhere, they sum this gradient by
    itself, and all but one hand on zeros.

    Args:
        copies: those of this rank; none where nothing is tied over stages.
    """
    for gradient in (found for copy in copies if (found := zero.gradient(copy)) is not None):
        alone = not zero.reduces_in_place and parallel_state.get_data_parallel_world_size() > 1
        if alone:
            dist.all_reduce(gradient, group=parallel_state.get_data_parallel_group())
        dist.all_reduce(gradient, group=parallel_state.get_embedding_group())
        if alone and parallel_state.get_data_parallel_rank() > 0:
            gradient.zero_()


def sum_over_tensor_parallel(gradients: list[Tensor]) -> None:
    """Sum partial gradients over the tensor-parallel group, one call for each dtype."""
    group = parallel_state.get_tensor_model_parallel_group()
    for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in same])
        dist.all_reduce(flat, group=group)
        for gradient, reduced in zip(same, flat.split([g.numel() for g in same]), strict=True):
            gradient.copy_(reduced.view_as(gradient))
