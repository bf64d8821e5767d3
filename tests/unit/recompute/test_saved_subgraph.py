from __future__ import annotations

import gc
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_crnet.planning.counters import LiveMemory
from megatron_crnet.recompute.saved_subgraph import SavedSubgraph


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)


def test_gradients_are_those_of_the_call_and_the_inputs_are_not_kept() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3)]
    expected = attend(*leaves)[0]
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, weight)

    inputs = [leaf.detach().clone() for leaf in leaves]
    gone = [weakref.ref(x.untyped_storage()) for x in inputs]
    (out,), subgraph = SavedSubgraph.record(attend, *inputs, keep_outputs=True)
    assert torch.equal(out, expected)
    kept = sum(tensor.numel() for tensor in subgraph.kept)
    assert kept == out.numel() + out.numel() // 8  # the output and its log-sum-exp, nothing twice
    del inputs
    assert all(reference() is None for reference in gone)

    (again,) = subgraph.resume(subgraph.kept_outputs(), *leaves)
    assert torch.equal(again, expected)
    for found, gradient in zip(torch.autograd.grad(again, leaves, weight), wanted, strict=True):
        assert torch.equal(found, gradient)


def test_weights_accumulate_their_gradient() -> None:
    weight, x = nn.Parameter(torch.randn(4, 3)), torch.randn(5, 4, requires_grad=True)
    (x @ weight).sum().backward()
    wanted, weight.grad = weight.grad, None
    (y,), subgraph = SavedSubgraph.record(lambda value: (value @ weight,), x.detach())
    assert subgraph.kept == []
    subgraph.resume((y,), x.detach().requires_grad_())[0].sum().backward()
    torch.testing.assert_close(weight.grad, wanted)


def test_a_subgraph_that_is_dropped_frees_what_it_kept() -> None:
    inputs = [torch.randn(2, 3, 16, 8) for _ in range(3)]
    gc.disable()  # at once, not when the collector comes by
    try:
        with LiveMemory() as memory:
            out, subgraph = SavedSubgraph.record(attend, *inputs, keep_outputs=True)
            assert memory.current > 0
            del out, subgraph
            assert memory.current == 0
    finally:
        gc.enable()
