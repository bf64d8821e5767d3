"""The cross-layer residual Y_l = s(beta_l) Y_{l-1} + Z_l B_l: forward, backward and inverse, element by element.

Every function computes in fp32 whatever the storage is. They are plain functions, because one autograd function
(`low_rank_products.py`) holds them together with the products that they follow.
"""

from __future__ import annotations

from torch import Tensor, dot, float32


def add_previous(update: Tensor, previous: Tensor, scale: Tensor) -> Tensor:
    """s Y_{l-1} + update.

    Args:
        update: z B of this layer, [s, b, w].
        previous: the same position's output one layer below, [s, b, w].
        scale: s(beta), a scalar in fp32 whatever the other dtypes are.
    """
    if update.dtype == float32:
        return update.addcmul(previous, scale)
    return update.float().addcmul_(previous.float(), scale).to(update.dtype)


def gradients(grad: Tensor, previous: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of Y_{l-1} and (in fp32) of beta; that of the update is `grad` itself."""
    grad_previous = (grad.float() * scale).to(grad.dtype)
    # ds/db = 1, so beta's gradient is the inner product of the output's gradient and Y_{l-1}
    return grad_previous, dot(grad.float().flatten(), previous.float().flatten())


def remove_update(output: Tensor, update: Tensor, scale: Tensor) -> Tensor:
    """Y_{l-1} = (Y_l - update) / s, to rounding: what `add_previous` rounded off comes back divided by s."""
    if output.dtype == float32:
        return output.sub(update).div_(scale)
    return output.float().sub_(update.float()).div_(scale).to(output.dtype)
