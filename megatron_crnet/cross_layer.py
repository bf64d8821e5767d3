"""The cross-layer residual Y_l = s(beta_l) Y_{l-1} + Z_l B_l as one differentiable operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_crnet.reference import signed_scale


class _CrossLayerResidual(torch.autograd.Function):
    """Computes in fp32 whatever the storage is, and keeps only `previous` and `beta` for backward."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, previous: Tensor, beta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(previous, beta)
        ctx.eps = eps
        scale = signed_scale(beta.float(), eps)
        if update.dtype == torch.float32:
            return torch.addcmul(update, previous, scale)
        return torch.addcmul(update.float(), previous.float(), scale).to(update.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        previous, beta = ctx.saved_tensors
        scale = signed_scale(beta.float(), ctx.eps)
        grad_previous = (grad * scale) if grad.dtype == torch.float32 else (grad.float() * scale).to(grad.dtype)
        # ds/db = 1, so beta's gradient is the inner product of the output's gradient and Y_{l-1}
        grad_beta = torch.dot(grad.float().flatten(), previous.float().flatten()).to(beta.dtype)
        return grad, grad_previous, grad_beta, None


def cross_layer_residual(update: Tensor, previous: Tensor, beta: Tensor, eps: float) -> Tensor:
    """s(beta) previous + update.

    Args:
        update: z B of this layer, [s, b, w].
        previous: the same position's output one layer below, [s, b, w].
        beta: scalar, fp32 whatever the other dtypes are.
        eps: `model.cross_layer_epsilon`.
    """
    return _CrossLayerResidual.apply(update, previous, beta, eps)
