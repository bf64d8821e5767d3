"""PELA's distillation losses (CVPR 2024, step 2): the gradients that they add, and their values.

    feature loss   mean over blocks, trained tokens and width of (X_l - X_l of the teacher)^2
    logit loss     mean over trained tokens and vocabulary of (logits - logits of the teacher)^2

A term of the feature loss belongs to one block, wherever that block is: on another pipeline stage, or inside of a
recomputed segment whose graph exists in backward alone. So no term goes through the loss at the model's end. Each
enters where its tensor is: `add_gradient` hands the tensor on and adds the term's gradient in backward. That needs the
tokens of the global batch to be known in the forward pass, which they are.

Shapes: s/t local sequence positions, b batch, h hidden. Plain PyTorch; compared with `reference_distillation.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, difference: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(difference)
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        # the factor multiplies within the operation, in fp32 also where tensors are bf16
        return torch.add(grads[0], difference, alpha=ctx.factor), None, None


def add_gradient(x: Tensor, difference: Tensor, factor: float) -> Tensor:
    """x itself; in backward its gradient is larger by `factor` times `difference`, of x's shape."""
    return _AddGradient.apply(x, difference, factor)


def masked_difference(x: Tensor, target: Tensor, trained: Tensor) -> Tensor:
    """x - target without a graph, in memory of its own; 0 where a token is not trained.

    Args:
        x, target: [..., width].
        trained: whether the token's loss counts, [...].
    """
    return (x.detach() - target).masked_fill_(~trained.unsqueeze(-1), 0.0)


def squared_sum(difference: Tensor) -> Tensor:
    """Sum of the squares of all elements, in fp64, without a copy in another precision."""
    return torch.linalg.vector_norm(difference, dim=-1, dtype=torch.float32).double().square().sum()


class FeatureMatch:
    """Draws the outputs of a chunk's blocks to the teacher's, in one pass of one micro-batch.

    Args:
        targets: the teacher's outputs [s/t, b, h] by layer; each is let go of when it has been used.
        trained: whether a token's loss counts, [s/t, b].
        factor: of the gradient: see `add_gradient`.

    Attributes:
        squares: sum of the squared differences so far.
    """

    def __init__(self, targets: dict[int, Tensor], trained: Tensor, factor: float) -> None:
        self._targets, self._trained, self._factor = targets, trained, factor
        self._recorded: dict[int, Tensor] = {}
        self.squares = torch.zeros((), dtype=torch.float64, device=trained.device)

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """The output x of a block, with what its gradient is to have besides.

        A pass that recomputation repeats takes the differences of the first one, whose loss has been counted.
        """
        difference = self._recorded.pop(layer, None)
        if difference is None:
            difference = masked_difference(x, self._targets.pop(layer), self._trained)
            self.squares += squared_sum(difference)
            if not torch.is_grad_enabled():  # the pass will be repeated in backward
                self._recorded[layer] = difference
        return add_gradient(x, difference, self._factor)
