"""z = X A, and Y = s(beta) Y_prev + z B for all positions of a group, with what tensor parallelism sends between.

A row group reduces z; a column group gathers it along the sequence going in, and scatters its gradient coming back.

Only the sequence shard of z is kept for backward; it is gathered once more there for the gradient of B, which
costs r-wide traffic and saves (t - 1)/t of z's memory (docs/parallelism.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_crnet.model.residual import EAGER, ResidualOps, signed_scale


def gather_sequence(shard: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> tuple[Tensor, Any]:
    """The shards [s/t, b, .] of every rank as [s, b, .], and the handle to wait for when asynchronous."""
    out = shard.new_empty((shard.shape[0] * group.size(), *shard.shape[1:]))
    return out, dist.all_gather_into_tensor(out, shard.contiguous(), group=group, async_op=async_op)


def scatter_sequence(partial: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> tuple[Tensor, Any]:
    """This rank's shard [s/t, b, .] of the sum of [s, b, .] over the group, and the handle as above."""
    out = partial.new_empty((partial.shape[0] // group.size(), *partial.shape[1:]))
    return out, dist.reduce_scatter_tensor(out, partial, group=group, async_op=async_op)


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


@dataclass(frozen=True)
class ProductOptions:
    """What `low_rank_outputs` is told beside the tensors.

    Attributes:
        gather_group: tensor-parallel group over which z is a sequence shard; None when it is whole.
        overlap: start the backward's communication asynchronously (on CUDA).
        epsilon: `model.cross_layer_epsilon`.
        residual: what computes the residual: forward, backward and inverse.
        known: the outputs themselves, already rebuilt. Then no product is done; the gradients are those of the
            products.
        gathered: z over the whole sequence, if it has been gathered before.
    """

    gather_group: dist.ProcessGroup | None = None
    overlap: bool = False
    epsilon: float = 1e-6
    residual: ResidualOps = EAGER
    known: tuple[Tensor, ...] | None = None
    gathered: Tensor | None = None


def products(z: Tensor, matrices: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """z B^T for every B; one batched product for each stack of equal shapes.

    Args:
        z: [s, b, sum of ranks], over the whole sequence.
        matrices: stacks of B, [n, w, r] each, in the order of z.
    """
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


class _LowRankOutputs(torch.autograd.Function):
    """`tensors` are the stacks of B, then the previous layer's outputs (none where a chain starts)."""

    @staticmethod
    def forward(
        ctx: Any, options: ProductOptions, stacks: int, z: Tensor, beta: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(z, beta, *tensors)
        ctx.stacks, ctx.group, ctx.gathered = stacks, options.gather_group, options.gathered
        ctx.overlap = options.overlap and z.is_cuda
        ctx.epsilon, ctx.residual = options.epsilon, options.residual
        if options.known is not None:
            return tuple(y.detach() for y in options.known)
        if options.gathered is not None:
            z = options.gathered
        elif options.gather_group is not None:
            z, _ = gather_sequence(z, options.gather_group)
        updates, previous = products(z, tensors[:stacks]), tensors[stacks:]
        if beta is None or not previous:
            return updates
        scales = signed_scale(beta.float(), options.epsilon)
        return tuple(options.residual.add_previous(*args) for args in zip(updates, previous, scales, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        z, beta, *tensors = ctx.saved_tensors
        matrices, previous = tensors[: ctx.stacks], tensors[ctx.stacks :]
        whole, wait_gather, wait_scatter = z, None, None
        if ctx.gathered is not None:
            whole = ctx.gathered
        elif ctx.group is not None:
            whole, wait_gather = gather_sequence(z, ctx.group, ctx.overlap)
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_z = _gradient_of_z(flat, matrices, whole)
        if wait_gather is not None:
            wait_gather.wait()
        if ctx.group is not None:
            grad_z, wait_scatter = scatter_sequence(grad_z, ctx.group, ctx.overlap)
        grad_matrices = _gradient_of_matrices(flat, matrices, whole)
        grad_beta, grad_previous = _gradients_of_residual(ctx.residual, flat, previous, beta, ctx.epsilon)
        if wait_scatter is not None:
            wait_scatter.wait()
        return None, None, grad_z, grad_beta, *grad_matrices, *grad_previous


def _gradient_of_z(grads: list[Tensor], matrices: Sequence[Tensor], like: Tensor) -> Tensor:
    """dz = dY B for each position, written side by side: [s, b, sum r]."""
    grad_z = torch.empty_like(like, memory_format=torch.contiguous_format)
    rows, start = grad_z.view(-1, grad_z.shape[-1]), 0
    for grad, matrix in zip(grads, (m for stack in matrices for m in stack), strict=True):
        rows[:, start : start + matrix.shape[1]] = grad @ matrix
        start += matrix.shape[1]
    return grad_z


def _gradient_of_matrices(grads: list[Tensor], matrices: Sequence[Tensor], z: Tensor) -> list[Tensor]:
    """dB = dY^T z for each position, in the stacks of `matrices`."""
    rows, start, remaining, stacks = z.reshape(-1, z.shape[-1]), 0, iter(grads), []
    for stack in matrices:
        out = torch.empty_like(stack)
        for index in range(stack.shape[0]):
            torch.mm(next(remaining).t(), rows[:, start : start + stack.shape[2]], out=out[index])
            start += stack.shape[2]
        stacks.append(out)
    return stacks


def _gradients_of_residual(
    residual: ResidualOps, grads: Sequence[Tensor], previous: Sequence[Tensor], beta: Tensor | None, epsilon: float
) -> tuple[Tensor | None, list[Tensor]]:
    if beta is None or not previous:
        return None, []
    scales = signed_scale(beta.float(), epsilon)
    whole = [grad.view(y.shape) for grad, y in zip(grads, previous, strict=True)]
    pairs = [residual.gradients(*args) for args in zip(whole, previous, scales, strict=True)]
    return torch.stack([grad_beta for _, grad_beta in pairs]).to(beta.dtype), [grad for grad, _ in pairs]


def low_rank_outputs(
    z: Tensor,
    matrices: Sequence[Tensor],
    beta: Tensor | None = None,
    previous: Sequence[Tensor] | None = None,
    options: ProductOptions = ProductOptions(),
) -> tuple[Tensor, ...]:
    """Y = s(beta) Y_prev + z B^T for every position of a group.

    Args:
        z: low-rank outputs side by side, [s, b, sum of ranks], or [s/t, b, .] with a gather group.
        matrices: stacks of B, [n, w, r] each, in the order of z.
        beta: one coefficient per position, fp32 whatever the other dtypes are; None without a residual.
        previous: the previous layer's outputs of the positions, [s, b, w] each; None where a chain starts.

    Returns:
        One [s, b, w] tensor for each B.
    """
    return _LowRankOutputs.apply(options, len(matrices), z, beta, *matrices, *(previous or ()))


def previous_outputs(
    z: Tensor, matrices: Sequence[Tensor], scales: Tensor, outputs: Sequence[Tensor], options: ProductOptions
) -> tuple[Tensor, ...]:
    """Y_prev = (Y - z B^T) / s, to rounding that grows by 1/|s|; arguments as in `low_rank_outputs`.

    Args:
        scales: s(beta) of every position, fp32.
        outputs: Y of every position, [s, b, w] each.
    """
    updates = products(z if options.gathered is None else options.gathered, matrices)
    return tuple(options.residual.remove_update(*args) for args in zip(outputs, updates, scales, strict=True))
