"""z = X A, and Y = s Y_prev + z B for all positions of a group, with what tensor parallelism sends between.

A row group reduces z; a column group gathers it along the sequence going in, and scatters its gradient coming back.

Only the sequence shard of z is kept for backward; it is gathered once more there for the gradient of B, which
costs r-wide traffic and saves (t - 1)/t of z's memory (docs/parallelism.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_crnet.model.regions import PLAIN, Regions


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
        regions: what computes s Y_prev, alone or with the product, and undoes it.
        known: the outputs themselves, already rebuilt. Then no product is done; the gradients are those of the
            products.
        gathered: z over the whole sequence, if it has been gathered before.
    """

    gather_group: dist.ProcessGroup | None = None
    overlap: bool = False
    regions: Regions = PLAIN
    known: tuple[Tensor, ...] | None = None
    gathered: Tensor | None = None


def add_products(
    z: Tensor, matrices: Iterable[Tensor], onto: Sequence[Tensor] | None = None, sign: int = 1
) -> tuple[Tensor, ...]:
    """z B^T of every B, [s, b, w].

    Each lies in memory of its own, so that those that nobody keeps are freed.

    Args:
        z: [s, b, sum of ranks], over the whole sequence.
        matrices: stacks of B, [n, w, r] each, in the order of z.
        onto: what they are added to in place, [s, b, w] each.
        sign: -1 subtracts.
    """
    outputs = []
    for position, (part, matrix) in enumerate(_factors(z, matrices)):
        if onto is None:
            outputs.append((part @ matrix.t()).view(*z.shape[:2], -1))
        else:
            onto[position].view(-1, matrix.shape[0]).addmm_(part, matrix.t(), alpha=sign)
    return tuple(outputs if onto is None else onto)


def _factors(z: Tensor, matrices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """What each B multiplies, a slice of z's rows, and that B."""
    rows, start = z.reshape(-1, z.shape[-1]), 0
    for matrix in (m for stack in matrices for m in stack):
        yield rows[:, start : start + matrix.shape[1]], matrix
        start += matrix.shape[1]


def _add_to_scaled(
    z: Tensor, matrices: Iterable[Tensor], betas: Tensor, previous: Sequence[Tensor], regions: Regions
) -> tuple[Tensor, ...]:
    """s(beta) Y_prev + z B^T of every position: in one pass where there is a kernel for that, else in two."""
    if regions.residual is None:
        return add_products(z, matrices, regions.scaled(betas, previous))
    positions = zip(_factors(z, matrices), previous, betas.unbind(), strict=True)
    return tuple(regions.residual(*factors, y, beta, regions.eps) for factors, y, beta in positions)


class _LowRankOutputs(torch.autograd.Function):
    """`tensors` are the stacks of B, then the previous layer's outputs (none where a chain starts)."""

    @staticmethod
    def forward(
        ctx: Any, options: ProductOptions, stacks: int, z: Tensor, betas: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        matrices, previous = tensors[:stacks], tensors[stacks:]
        ctx.save_for_backward(z, *matrices)
        ctx.group, ctx.gathered, ctx.chained = options.gather_group, options.gathered, bool(previous)
        ctx.overlap = options.overlap and z.is_cuda
        if options.known is not None:
            return tuple(y.detach() for y in options.known)
        if options.gathered is not None:
            z = options.gathered
        elif options.gather_group is not None:
            z, _ = gather_sequence(z, options.gather_group)
        if not previous:
            return add_products(z, matrices)
        if betas is not None:
            return _add_to_scaled(z, matrices, betas, previous, options.regions)
        return add_products(z, matrices, [y.clone(memory_format=torch.contiguous_format) for y in previous])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        z, *matrices = ctx.saved_tensors
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
        if wait_scatter is not None:
            wait_scatter.wait()
        # the previous layer multiplies them by s
        return None, None, grad_z, None, *grad_matrices, *(grads if ctx.chained else ())


def _gradient_of_z(grads: list[Tensor], matrices: Sequence[Tensor], like: Tensor) -> Tensor:
    """dz = dY B for each position, written side by side: [s, b, sum r]."""
    grad_z = torch.empty_like(like, memory_format=torch.contiguous_format)
    rows, start = grad_z.view(-1, grad_z.shape[-1]), 0
    for grad, matrix in zip(grads, (m for stack in matrices for m in stack), strict=True):
        torch.mm(grad, matrix, out=rows[:, start : start + matrix.shape[1]])
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


def low_rank_outputs(
    z: Tensor,
    matrices: Sequence[Tensor],
    betas: Tensor | None = None,
    previous: Sequence[Tensor] | None = None,
    options: ProductOptions = ProductOptions(),
) -> tuple[Tensor, ...]:
    """Y = s(beta) Y_prev + z B^T for every position of a group.

    The gradient of Y_prev is returned *unscaled*, as that of Y, and that of beta not at all: both are the business of
    whoever made Y_prev (`model/regions.py`).

    Args:
        z: low-rank outputs side by side, [s, b, sum of ranks], or [s/t, b, .] with a gather group.
        matrices: stacks of B, [n, w, r] each, in the order of z.
        betas: one per position, fp32 whatever the other dtypes are; None without a residual, or to add `previous` as it
            is.
        previous: the previous layer's outputs of the positions, [s, b, w] each; None where a chain starts.

    Returns:
        One [s, b, w] tensor for each B.
    """
    return _LowRankOutputs.apply(options, len(matrices), z, betas, *matrices, *(previous or ()))


def previous_outputs(
    z: Tensor, matrices: Sequence[Tensor], betas: Tensor, outputs: Sequence[Tensor], options: ProductOptions
) -> tuple[Tensor, ...]:
    """Y_prev = (Y - z B^T) / s, to rounding that grows by 1/|s|; arguments as in `low_rank_outputs`.

    Args:
        outputs: Y of every position, [s, b, w] each.
    """
    differences = [y.clone(memory_format=torch.contiguous_format) for y in outputs]
    add_products(z if options.gathered is None else options.gathered, matrices, differences, sign=-1)
    return options.regions.unscaled(betas, differences)
