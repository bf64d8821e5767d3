"""z = X A of a group, with the reduction that a row group needs under tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_crnet.model.sequence_shards import gather_sequence, scatter_sequence


@dataclass(frozen=True)
class Reduction:
    """How the partial products of a row group become z.

    Attributes:
        group: the tensor-parallel group.
        scatter: z is left as sequence shards, [s/t, b, r]; otherwise whole on every rank.
    """

    group: dist.ProcessGroup
    scatter: bool

    def __call__(self, partial: Tensor) -> Tensor:
        """Sum over the group."""
        if not self.scatter:
            dist.all_reduce(partial, group=self.group)
            return partial
        return scatter_sequence(partial, self.group)[0]

    def gradient(self, grad: Tensor) -> Tensor:
        """Gradient of the partial products: the whole of z's."""
        if not self.scatter:
            return grad
        return gather_sequence(grad, self.group)[0]


class _InputProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, reduction: Reduction | None, known: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, a)
        ctx.reduction = reduction
        if known is not None:
            return known.detach()
        z = F.linear(x, a)
        return z if reduction is None else reduction(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a = ctx.saved_tensors
        grad = grads[0] if ctx.reduction is None else ctx.reduction.gradient(grads[0])
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = (rows @ a).view(x.shape)
        return grad_x, rows.t() @ x.reshape(-1, x.shape[-1]), None, None


def input_product(x: Tensor, a: Tensor, reduction: Reduction | None, known: Tensor | None = None) -> Tensor:
    """z = X A^T.

    Args:
        x: [s, b, h_in], whole or a shard (`model/linear.py`).
        a: all A of the group, [sum of ranks, h_in].
        reduction: how partial products are summed; None where x A is z.
        known: z itself, kept from the forward pass. Then no product is done and nothing is sent; the gradients
            are those of the product.
    """
    return _InputProduct.apply(x, a, reduction, known)
