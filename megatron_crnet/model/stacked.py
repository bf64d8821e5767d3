"""Products of tokens with the stacked weights of their experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16
"""Rows of a product's factors begin at multiples of as many bytes, which GPUs ask for."""
LAST_GROUPED = 9
"""Largest compute capability with one call for all experts: on Blackwell the gradients of experts without tokens are
not set (pytorch#172439)."""


def stacked_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """X W of each expert's tokens, [tokens, out], in one call.

    Args:
        x: tokens of the first expert, then of the next, [tokens, in].
        weights: [experts, out, in], all of which take part.
        ends: where each expert's tokens end, [experts] in int32.
    """
    y: Tensor = _StackedProduct.apply(x, weights, ends)
    return y


class _StackedProduct(torch.autograd.Function):
    """Keeps the parameter itself, whose values ZeRO-3 takes away after forward and brings back for backward.

    What autograd would keep of a product is a view or a padded copy of them: those of all layers would stay.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights, ends)
        y = _by_expert(aligned(x), aligned(weights).transpose(1, 2), ends)
        return y.narrow(1, 0, weights.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, ends = ctx.saved_tensors
        gradient = aligned(gradients[0])
        of_x = of_weights = None
        if ctx.needs_input_grad[0]:
            of_x = _by_expert(gradient, aligned(weights), ends).narrow(1, 0, x.shape[1])
        if ctx.needs_input_grad[1]:
            whole = _over_tokens(gradient, aligned(x), ends)
            of_weights = whole[:, : weights.shape[1], : weights.shape[2]].contiguous()
        return of_x, of_weights, None


def loops(x: Tensor) -> bool:
    """Whether experts are multiplied one by one, for which the host waits."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] > LAST_GROUPED


def _by_expert(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Rows of x [tokens, in] times the matrix [in, out] of their expert: [tokens, out]."""
    if not loops(x):
        return F.grouped_mm(x, matrices, offs=ends)
    parts = x.split(_sizes(ends))
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices.unbind(), strict=True)])


def _over_tokens(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """The sum over each expert's tokens of outer products: [experts, out, in] of [tokens, out] and [tokens, in]."""
    if not loops(left):
        return F.grouped_mm(left.t(), right, offs=ends)
    sizes = _sizes(ends)
    return torch.stack([a.t() @ b for a, b in zip(left.split(sizes), right.split(sizes), strict=True)])


def _sizes(ends: Tensor) -> list[int]:
    sizes: list[int] = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return sizes


def aligned(x: Tensor) -> Tensor:
    """x with all sides but the first in whole units of `ALIGNMENT` bytes, in memory that begins at such a unit."""
    unit = ALIGNMENT // x.element_size()
    missing = [-side % unit for side in x.shape[1:]]
    if any(missing):
        return F.pad(x, [n for side in reversed(missing) for n in (0, side)])
    # in ZeRO's flat buffer, or columns of a wider matrix
    if x.stride(-1) != 1 or x.storage_offset() % unit or any(stride % unit for stride in x.stride()[:-1]):
        return x.clone(memory_format=torch.contiguous_format)
    return x
