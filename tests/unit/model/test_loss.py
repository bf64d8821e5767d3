from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from megatron_crnet.distributed.process_groups import initialize_parallel, shutdown_parallel
from megatron_crnet.model import loss
from megatron_crnet.model.loss import token_losses
from tests.helpers import tiny_config


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    initialize_parallel(tiny_config())
    yield
    shutdown_parallel()


def _group() -> dist.ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("few", [1, 23 * 4, 2**22], ids=["row by row", "four rows", "at once"])
def test_losses_and_gradients_are_cross_entropys(
    dtype: torch.dtype, bound: float, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "FEW", few)
    torch.manual_seed(0)
    values, labels, weights = torch.randn(5, 2, 23).mul_(8).to(dtype), torch.randint(0, 23, (5, 2)), torch.rand(5, 2)
    logits = values.clone().requires_grad_()
    exact = values.double().requires_grad_()
    found = token_losses(logits * 1, labels, 23, _group())
    wanted = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view(5, 2)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    found.backward(weights)
    wanted.backward(weights.double())
    assert logits.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=bound, atol=bound)


def test_padding_behind_the_vocabulary_takes_no_probability_and_gets_no_gradient() -> None:
    torch.manual_seed(0)
    values, labels, group = torch.randn(5, 2, 32), torch.randint(0, 23, (5, 2)), _group()
    padded, exact = values.clone().requires_grad_(), values[..., :23].clone().requires_grad_()
    found, wanted = token_losses(padded * 1, labels, 23, group), token_losses(exact * 1, labels, 23, group)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    found.sum().backward()
    wanted.sum().backward()
    assert padded.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(padded.grad[..., :23], exact.grad, rtol=1e-6, atol=1e-6)
    assert not padded.grad[..., 23:].any()
    labels[0, 0] = 25  # a token of the padding has no logit of its own, as one beyond it
    of_padding = token_losses(values.clone(), labels, 23, group)[0, 0]
    torch.testing.assert_close(of_padding, values[0, 0, :23].logsumexp(0))


def test_nothing_as_large_as_the_logits_is_kept_beside_them() -> None:
    kept: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    logits = torch.randn(6, 1, 50, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        token_losses(logits, torch.zeros(6, 1, dtype=torch.long), 50, _group())
    assert kept == [6, 6]
