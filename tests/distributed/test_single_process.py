"""Megatron-Core's CR-Net against the reference with the same weights, in one process: logits, loss, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_crnet.gpt import build_model_chunks
from megatron_crnet.parallel import initialize_parallel, shutdown_parallel
from megatron_crnet.reference import ReferenceCRNet
from megatron_crnet.weights import canonical_weights, load_canonical
from tests.helpers import make_batch, random_tokens, relative_error, tiny_config

PER_POSITION = {"q": [3, 4, 5, 6], "k": 4, "v": 4, "o": 6, "gate": 7, "up": 7, "down": [9, 8, 7, 6]}
MODELS: dict[str, dict[str, Any]] = {
    "crnet": {},
    "full_rank": {"variant": "full_rank"},
    "low_rank": {"variant": "low_rank"},
    "cola": {"variant": "cola"},
    "grouped_query": {"num_query_groups": 2},
    "multi_query_cola": {"variant": "cola", "num_query_groups": 1},
    "ranks_by_layer": {"rank": [2, 4, 6, 8]},
    "ranks_by_position": {"rank": PER_POSITION},
    "two_chains": {"full_rank_layers": [0, 2]},
    "first_layer_low_rank": {"full_rank_layers": []},
    "wide": {"hidden_size": 64, "ffn_hidden_size": 43, "num_attention_heads": 2, "rank": 1},
    "small_beta": {"beta_init": 0.0},
}


@pytest.fixture(scope="module", autouse=True)
def groups() -> Any:
    initialize_parallel(tiny_config())
    yield
    shutdown_parallel()


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_every_gradient_equal_the_reference(name: str) -> None:
    config = tiny_config(model=MODELS[name])
    (model,) = build_model_chunks(config)
    torch.manual_seed(1)
    reference = ReferenceCRNet(config.model)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() else parameter.data.add_(0.1 * torch.randn(()))
    load_canonical(model, reference.state_dict())
    if name == "small_beta":
        for group in (model.decoder.layers[1].linear_o, model.decoder.layers[2].linear_qkv):
            torch.nn.init.zeros_(group.beta)
        values = {w.name: w.local().detach().clone() for w in canonical_weights(model)}
        reference.load_state_dict(values)
        assert any(v.item() < 0 for n, v in values.items() if n.endswith("beta"))
    reference.double()
    tokens, labels = random_tokens(config)
    batch = make_batch(tokens, labels)
    with torch.no_grad():
        logits = model(tokens, batch["position_ids"], None)
        torch.testing.assert_close(logits.double(), reference(tokens), rtol=1e-5, atol=1e-5)
    loss = model.token_losses(batch).mean()
    plain = reference.loss(tokens, labels)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    loss.backward()
    plain.backward()
    wanted = {n: p.grad for n, p in reference.named_parameters()}
    weights = {w.name: w for w in canonical_weights(model)}
    assert set(weights) == set(wanted)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())
    pairs = ((n, w.local(w.parameter.grad), wanted[n], wanted[n]) for n, w in weights.items())
    assert relative_error(pairs) < 1e-5


def test_the_stacked_b_matrices_are_one_parameter_where_shapes_allow() -> None:
    (model,) = build_model_chunks(tiny_config())
    assert model.decoder.layers[1].linear_qkv.b0.shape == (3, 32, 8)
    (grouped,) = build_model_chunks(tiny_config(model={"num_query_groups": 2}))
    qkv = grouped.decoder.layers[1].linear_qkv
    assert (qkv.b0.shape, qkv.b1.shape) == ((1, 32, 8), (2, 16, 8))


def test_beta_is_fp32_in_a_bf16_model() -> None:
    (model,) = build_model_chunks(tiny_config(training={"dtype": "bf16"}))
    group = model.decoder.layers[1].linear_qkv
    assert (group.a.dtype, group.beta.dtype) == (torch.bfloat16, torch.float32)
