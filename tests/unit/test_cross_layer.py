from __future__ import annotations

import pytest
import torch

from megatron_crnet.cross_layer import cross_layer_residual
from megatron_crnet.reference import signed_scale

EPS = 1e-6


@pytest.mark.parametrize(("beta", "scale"), [(0.5, 0.5 + EPS), (-0.5, -0.5 - EPS), (0.0, EPS), (-0.0, EPS)])
def test_the_scale_keeps_the_sign_and_is_never_zero(beta: float, scale: float) -> None:
    assert signed_scale(torch.tensor(beta, dtype=torch.float64), EPS).item() == pytest.approx(scale, abs=1e-15)


@pytest.mark.parametrize("beta", [0.9, -0.4, 0.0])
def test_value_and_gradients_are_those_of_plain_autograd(beta: float) -> None:
    torch.manual_seed(0)
    update, previous = torch.randn(2, 5, 3, 7).requires_grad_().unbind()
    leaves = [update.detach().requires_grad_(), previous.detach().requires_grad_(), torch.tensor(beta).requires_grad_()]
    plain = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    ours = cross_layer_residual(*leaves, EPS)
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
    update = torch.zeros_like(previous)
    result = cross_layer_residual(update, previous, torch.tensor(1.004), EPS)
    assert result.dtype == torch.bfloat16
    assert result.unique().tolist() == [torch.tensor(100.4).bfloat16().item()]


def test_beta_gets_an_fp32_gradient_summed_in_fp32() -> None:
    previous = torch.full((64, 1, 64), 1 / 256, dtype=torch.bfloat16)
    beta = torch.tensor(1.0, requires_grad=True)
    cross_layer_residual(torch.zeros_like(previous), previous, beta, EPS).sum().backward()
    assert beta.grad is not None
    assert beta.grad.item() == pytest.approx(64 * 64 / 256, rel=1e-5)
