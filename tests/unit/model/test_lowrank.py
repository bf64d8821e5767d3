from __future__ import annotations

import torch

from megatron_crnet.model.lowrank import low_rank_outputs


def test_products_and_gradients_are_those_of_plain_autograd() -> None:
    """Two stacks: three matrices of one shape (batched) and one of another."""
    torch.manual_seed(0)
    z = torch.randn(5, 2, 3 * 4 + 6, dtype=torch.float64, requires_grad=True)
    stacks = [torch.randn(3, 7, 4, dtype=torch.float64), torch.randn(1, 9, 6, dtype=torch.float64)]
    stacks = [stack.requires_grad_() for stack in stacks]
    parameters = [z, *stacks]
    ours = low_rank_outputs(z, stacks)
    matrices = [*stacks[0], *stacks[1]]
    expected = [part @ m.t() for part, m in zip(z.split([4, 4, 4, 6], dim=-1), matrices, strict=True)]
    weights = [torch.randn_like(y) for y in expected]
    for y, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(y, other)
    found = torch.autograd.grad(ours, parameters, weights)
    wanted = torch.autograd.grad(expected, parameters, weights)
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other)


def test_only_z_and_the_matrices_are_kept_for_backward() -> None:
    kept: list[int] = []
    z = torch.randn(16, 2, 8, requires_grad=True)
    stack = torch.randn(2, 64, 4, requires_grad=True)

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        low_rank_outputs(z, [stack])
    assert sorted(kept) == sorted([z.numel(), stack.numel()])
