from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_crnet.model.lowrank import low_rank_outputs
from megatron_crnet.model.residual import add_previous, gradients, remove_update, signed_scale

EPS = 1e-6


def residual(update: torch.Tensor, previous: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """s(beta) previous + update through the function that the model uses: the update is z times the identity."""
    identity = torch.eye(update.shape[-1], dtype=update.dtype).unsqueeze(0)
    return low_rank_outputs(update, [identity], beta.unsqueeze(0), [previous])[0]


@pytest.mark.parametrize(("beta", "scale"), [(0.5, 0.5 + EPS), (-0.5, -0.5 - EPS), (0.0, EPS), (-0.0, EPS)])
def test_the_scale_keeps_the_sign_and_is_never_zero(beta: float, scale: float) -> None:
    assert signed_scale(torch.tensor(beta, dtype=torch.float64), EPS).item() == pytest.approx(scale, abs=1e-15)


@pytest.mark.parametrize("beta", [0.9, -0.4, 0.0])
def test_value_and_gradients_are_those_of_plain_autograd(beta: float) -> None:
    torch.manual_seed(0)
    update, previous = torch.randn(2, 5, 3, 7).requires_grad_().unbind()
    leaves = [update.detach().requires_grad_(), previous.detach().requires_grad_(), torch.tensor(beta).requires_grad_()]
    plain = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    ours = residual(*leaves)
    expected = plain[0] + plain[1] * signed_scale(plain[2], EPS)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    ours.backward(weight)
    expected.backward(weight)
    for leaf, other in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)


def test_bf16_outputs_see_the_whole_precision_of_beta() -> None:
    # bf16 holds 1.0 and 1.0078, nothing between
    previous = torch.full((4, 1, 8), 100.0, dtype=torch.bfloat16)
    result = add_previous(torch.zeros_like(previous), previous, torch.tensor(1.004))
    assert result.dtype == torch.bfloat16
    assert result.unique().tolist() == [torch.tensor(100.4).bfloat16().item()]


def test_beta_gets_an_fp32_gradient_summed_in_fp32() -> None:
    previous = torch.full((64, 1, 64), 1 / 256, dtype=torch.bfloat16)
    beta = torch.tensor(1.0, requires_grad=True)
    residual(torch.zeros_like(previous), previous, beta).sum().backward()
    assert beta.grad is not None
    assert beta.grad.item() == pytest.approx(64 * 64 / 256, rel=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scale", [0.9, -0.7])
def test_the_residual_can_be_undone_to_rounding(dtype: torch.dtype, bound: float, scale: float) -> None:
    torch.manual_seed(0)
    update, previous = torch.randn(2, 5, 3, 7).to(dtype)
    output = add_previous(update, previous, torch.tensor(scale))
    found = remove_update(output, update, torch.tensor(scale))
    assert found.dtype == dtype
    assert (found - previous).norm() / previous.norm() < bound


class MovedBytes(TorchDispatchMode):
    """Counts operations that are no views, and adds up every tensor that goes into one or comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            self.total += sum(x.nbytes for x in (*args, out) if isinstance(x, torch.Tensor))
        return out


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.bfloat16, [(30, 4), (34, 5), (38, 5)]), (torch.float32, [(12, 1), (16, 2), (20, 2)])],
    ids=["bf16", "fp32"],
)
def test_bytes_an_element_and_operations_of_the_plain_functions(
    dtype: torch.dtype, wanted: list[tuple[int, int]]
) -> None:
    """The figures of docs/reporting.md; the kernels' are in test_cross_layer_kernels.py."""
    x, y, scale = torch.ones(64, 2, 64, dtype=dtype), torch.ones(64, 2, 64, dtype=dtype), torch.tensor(0.5)
    found = []
    for function in (add_previous, gradients, remove_update):
        with MovedBytes() as moved:
            function(x, y, scale)
        found.append((round(moved.total / x.numel()), moved.operations))
    assert found == wanted
