"""Cross-entropy over a vocabulary that tensor parallelism splits, without fp32 copies of the logits.

The logits stay in the dtype of the output product; what is computed in fp32 is a few rows at a time, or nothing but a
register where the functions of `model/glue.py` are compiled. Nobody needs the logits themselves: their exponentials
take their place, and in backward their gradient. Repeating the product there instead would save that memory too, at 7B
256 MiB of 60 GiB with 4096 tokens, and cost a product of the output layer: 9% of all operations at 60M.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_crnet.model.glue import EAGER, FEW, Glue


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, glue: Glue, group: dist.ProcessGroup, vocabulary: int, logits: Tensor, labels: Tensor
    ) -> Tensor:
        rows = logits.detach().view(-1, logits.shape[-1])
        first = group.rank() * rows.shape[1]
        if vocabulary < first + rows.shape[1]:
            rows[:, vocabulary - first :] = -math.inf  # padding, which takes no probability and gets no gradient
            labels = labels.masked_fill(labels >= vocabulary, -1)
        local = labels.reshape(-1) - first
        found = []
        for part, of_part in _few(glue, rows, local):
            found.append(glue.exponentials_(part, of_part))
        largest, total, at_label = (torch.cat(x) for x in zip(*found, strict=True))
        highest = largest.clone()
        if group.size() > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        rescale = (largest - highest).exp()
        total = total * rescale
        if group.size() > 1:
            total, at_label = sums = torch.stack((total, at_label))
            dist.all_reduce(sums, group=group)
        ctx.glue, ctx.rows = glue, rows
        ctx.save_for_backward(local, rescale / total)
        return (total.log() + highest - at_label).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        local, share = ctx.saved_tensors
        rows, ctx.rows = ctx.rows, None
        for part, *of_part in _few(ctx.glue, rows, local, share, grads[0].reshape(-1)):
            ctx.glue.logit_gradient_(part, *of_part)
        return None, None, None, rows.view(*grads[0].shape, -1), None


def _few(glue: Glue, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    step = max(1, FEW // tensors[0].shape[1]) if glue is EAGER else max(1, len(tensors[0]))
    return zip(*(x.split(step) for x in tensors), strict=True)


def token_losses(
    logits: Tensor, labels: Tensor, vocabulary: int, group: dist.ProcessGroup, glue: Glue = EAGER
) -> Tensor:
    """Cross-entropy in nats, fp32, of the shape of `labels`.

    Overwrites the logits.

    Args:
        logits: this rank's part of the vocabulary, [..., V/t], contiguous, on the last ranks with padding behind it.
        labels: tokens, the same on all ranks of the group; one outside the vocabulary has no logit of its own.
        vocabulary: V, without padding.
        group: tensor-parallel group.
    """
    return _TokenLosses.apply(glue, group, vocabulary, logits, labels)
