"""z B for all positions of a group, with the sequence gathered on the way in and scattered on the way back.

Only the sequence shard of z is kept for backward; it is gathered once more there for the gradient of B, which
costs r-wide traffic and saves (t - 1)/t of z's memory (docs/parallelism.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _gather(z: Tensor, group: dist.ProcessGroup, async_op: bool) -> tuple[Tensor, Any]:
    out = z.new_empty((z.shape[0] * group.size(), *z.shape[1:]))
    return out, dist.all_gather_into_tensor(out, z.contiguous(), group=group, async_op=async_op)


def _scatter(grad: Tensor, group: dist.ProcessGroup, async_op: bool) -> tuple[Tensor, Any]:
    out = grad.new_empty((grad.shape[0] // group.size(), *grad.shape[1:]))
    return out, dist.reduce_scatter_tensor(out, grad, group=group, async_op=async_op)


def _products(z: Tensor, matrices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """z: [s, b, sum r]; matrices: [n, w, r] each. One batched product for each stack of equal shapes."""
    s, b, start, outputs = *z.shape[:2], 0, []
    for stack in matrices:
        count, width, rank = stack.shape
        part = z[..., start : start + count * rank].reshape(s * b, count, rank)
        if count == 1:
            outputs.append((part[:, 0] @ stack[0].t()).view(s, b, width))
        else:
            outputs.extend(torch.bmm(part.transpose(0, 1), stack.transpose(1, 2)).view(count, s, b, width).unbind())
        start += count * rank
    return tuple(outputs)


class _LowRankProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, group: dist.ProcessGroup | None, overlap: bool, *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(z, *matrices)
        ctx.group = group
        ctx.overlap = overlap and z.is_cuda
        if group is not None:
            z, _ = _gather(z, group, async_op=False)
        return _products(z, matrices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        z, *matrices = ctx.saved_tensors
        wait_gather = wait_scatter = None
        if ctx.group is not None:
            z, wait_gather = _gather(z, ctx.group, ctx.overlap)
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_z = _gradient_of_z(flat, matrices, z)
        if wait_gather is not None:
            wait_gather.wait()
        if ctx.group is not None:
            grad_z, wait_scatter = _scatter(grad_z, ctx.group, ctx.overlap)
        grad_matrices = _gradient_of_matrices(flat, matrices, z)
        if wait_scatter is not None:
            wait_scatter.wait()
        return grad_z, None, None, *grad_matrices


def _gradient_of_z(grads: list[Tensor], matrices: list[Tensor], like: Tensor) -> Tensor:
    """dz = dY B for each position, written side by side: [s, b, sum r]."""
    grad_z = torch.empty_like(like, memory_format=torch.contiguous_format)
    rows, start = grad_z.view(-1, grad_z.shape[-1]), 0
    for grad, matrix in zip(grads, (m for stack in matrices for m in stack), strict=True):
        rows[:, start : start + matrix.shape[1]] = grad @ matrix
        start += matrix.shape[1]
    return grad_z


def _gradient_of_matrices(grads: list[Tensor], matrices: list[Tensor], z: Tensor) -> list[Tensor]:
    """dB = dY^T z for each position, in the stacks of `matrices`."""
    rows, start, remaining, stacks = z.reshape(-1, z.shape[-1]), 0, iter(grads), []
    for stack in matrices:
        out = torch.empty_like(stack)
        for index in range(stack.shape[0]):
            torch.mm(next(remaining).t(), rows[:, start : start + stack.shape[2]], out=out[index])
            start += stack.shape[2]
        stacks.append(out)
    return stacks


def low_rank_products(
    z: Tensor, matrices: list[Tensor], *, gather_group: dist.ProcessGroup | None, overlap: bool
) -> tuple[Tensor, ...]:
    """Y = z B^T for every position of a group.

    Args:
        z: low-rank outputs side by side, [s, b, sum of ranks], or [s/t, b, .] when `gather_group` is given.
        matrices: stacks of B, [n, w, r] each, in the order of z.
        gather_group: tensor-parallel group over which z is a sequence shard; None when it is whole.
        overlap: start the backward's communication asynchronously (on CUDA).

    Returns:
        One [s, b, w] tensor for each B.
    """
    return _LowRankProducts.apply(z, gather_group, overlap, *matrices)
