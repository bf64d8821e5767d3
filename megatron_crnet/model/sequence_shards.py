"""Tensors [s, b, .] as sequence shards [s/t, b, .] and back."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def gather_sequence(shard: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> tuple[Tensor, Any]:
    """The shards [s/t, b, .] of every rank as [s, b, .], and the handle to wait for when asynchronous."""
    out = shard.new_empty((shard.shape[0] * group.size(), *shard.shape[1:]))
    return out, dist.all_gather_into_tensor(out, shard.contiguous(), group=group, async_op=async_op)


def scatter_sequence(partial: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> tuple[Tensor, Any]:
    """This rank's shard [s/t, b, .] of the sum of [s, b, .] over the group, and the handle as above."""
    out = partial.new_empty((partial.shape[0] // group.size(), *partial.shape[1:]))
    return out, dist.reduce_scatter_tensor(out, partial, group=group, async_op=async_op)
