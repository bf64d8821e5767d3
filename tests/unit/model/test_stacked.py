from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_crnet.model import stacked
from megatron_crnet.model.stacked import stacked_product


def looped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """What `stacked_product` computes, by plain autograd."""
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(part, weight) for part, weight in zip(x.split(sizes), weights.unbind(), strict=True)])


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize(("out", "inner"), [(16, 8), (6, 5)])
def test_one_product_for_all_experts_gives_the_bits_of_one_each(
    out: int, inner: int, loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacked, "loops", lambda _: loops)
    torch.manual_seed(3)
    ends = torch.tensor([3, 3, 7, 12], dtype=torch.int32)
    # weights in the middle of a flat buffer, tokens with other columns beside them
    flat, wide = torch.randn(3 + 4 * out * inner), torch.randn(12, inner + 3)
    found = []
    for product in (stacked_product, looped_product):
        weights = flat[3:].view(4, out, inner).detach().requires_grad_()
        x = wide[:, 3:].detach().requires_grad_()
        y = product(x, weights, ends)
        y.square().sum().backward()
        found.append((y, x.grad, weights.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("out", "inner"), [(128, 64), (60, 35)])
def test_on_a_gpu_too_and_experts_without_tokens_have_gradients_of_zero(
    dtype: torch.dtype, out: int, inner: int
) -> None:
    torch.manual_seed(4)
    ends = torch.tensor([0, 64, 64, 80], dtype=torch.int32, device="cuda")
    x, flat = torch.randn(80, inner, device="cuda", dtype=dtype), torch.randn(3 + 4 * out * inner, device="cuda")
    found = []
    for product in (stacked_product, looped_product):
        weights = flat.to(dtype)[3:].view(4, out, inner).detach().requires_grad_()
        torch.full((2**20,), math.nan, device="cuda")  # what the allocator gives next is no zeros
        y = product(x, weights, ends)
        y.float().square().mean().backward()
        assert weights.grad is not None
        found.append((y, weights.grad))
    assert not found[0][1][[0, 2]].any()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-3)


def test_experts_without_tokens_have_gradients_of_zero() -> None:
    x, weights = torch.randn(5, 4), torch.randn(3, 2, 4, requires_grad=True)
    y = stacked_product(x, weights, torch.tensor([2, 2, 5], dtype=torch.int32))
    torch.testing.assert_close(y, torch.cat([x[:2] @ weights[0].T, x[2:] @ weights[2].T]))
    y.square().sum().backward()
    assert weights.grad is not None
    assert not weights.grad[1].any()
    assert weights.grad[0].any()


@pytest.mark.parametrize("out", [4, 3])
def test_nothing_else_keeps_the_values_of_weights(out: int) -> None:
    """ZeRO-3 takes them away after forward, and brings them back for backward."""
    torch.manual_seed(5)
    x, weights = torch.randn(5, 4, requires_grad=True), torch.nn.Parameter(torch.randn(2, out, 4))
    values, ends = weights.detach().clone(), torch.tensor([2, 5], dtype=torch.int32)
    y, gathered = stacked_product(x, weights, ends), StorageWeakRef(weights.untyped_storage())
    weights.data = torch.empty(0)
    assert gathered.expired()
    weights.data = values
    found = torch.autograd.grad(y.square().sum(), (x, weights))
    wanted = torch.autograd.grad(looped_product(x, weights, ends).square().sum(), (x, weights))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
