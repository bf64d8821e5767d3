"""The reference against the equations themselves, written out once more in the plainest way."""

from __future__ import annotations

import pytest
import torch

from megatron_crnet.config.schema import ModelConfig
from megatron_crnet.model.reference import CrossLayerLinear, ReferenceCRNet, apply_rope

SIZES = {
    "num_layers": 3,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "rank": 4,
}


def _model(**changes: object) -> ReferenceCRNet:
    torch.manual_seed(0)
    model = ReferenceCRNet(ModelConfig(**{**SIZES, **changes}))  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_a_low_rank_map_is_the_equation() -> None:
    config = ModelConfig(**SIZES)  # type: ignore[arg-type]
    linear = CrossLayerLinear(16, 24, 4, True, config)
    torch.nn.init.constant_(linear.beta, -0.25)
    x, previous = torch.randn(2, 3, 16), torch.randn(2, 3, 24)
    expected = -(0.25 + 1e-6) * previous + x @ linear.a.weight.T @ linear.b.weight.T
    torch.testing.assert_close(linear(x, previous), expected)


def test_cola_puts_silu_between_the_factors_and_has_no_cross_layer_path() -> None:
    linear = CrossLayerLinear(16, 24, 4, False, ModelConfig(**SIZES, variant="cola"))  # type: ignore[arg-type]
    x = torch.randn(2, 3, 16)
    expected = torch.nn.functional.silu(x @ linear.a.weight.T) @ linear.b.weight.T
    torch.testing.assert_close(linear(x, None), expected)


def test_rope_is_the_rotate_half_form() -> None:
    x = torch.randn(1, 1, 5, 4)
    out = apply_rope(x, 10000.0)
    for position in range(5):
        for pair in range(2):
            angle = torch.tensor(position * 10000.0 ** (-2 * pair / 4))
            a, b = x[0, 0, position, pair], x[0, 0, position, pair + 2]
            torch.testing.assert_close(out[0, 0, position, pair], a * angle.cos() - b * angle.sin())
            torch.testing.assert_close(out[0, 0, position, pair + 2], b * angle.cos() + a * angle.sin())


def test_every_layer_sees_the_outputs_of_the_layer_before() -> None:
    """Zeroing all B of the last layer leaves s(beta) times the outputs of the layer before."""
    model = _model()
    seen: list[dict[str, torch.Tensor]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    last = model.model.layers[2]
    with torch.no_grad():
        for linear in (*last.self_attn.children(), *last.mlp.children()):
            linear.b.weight.zero_()
            linear.beta.fill_(0.5)
    model(torch.randint(32, (2, 6)))
    for position, value in seen[2].items():
        torch.testing.assert_close(value, (0.5 + 1e-6) * seen[1][position])


@pytest.mark.parametrize("changes", [{}, {"variant": "full_rank"}, {"variant": "cola"}, {"num_query_groups": 1}])
def test_the_model_is_causal(changes: dict[str, object]) -> None:
    model, tokens = _model(**changes), torch.randint(32, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 32
    first, second = model(tokens), model(changed)
    torch.testing.assert_close(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, 5:], second[:, 5:])


@pytest.mark.fault("documents")
@pytest.mark.parametrize("variant", ["crnet", "full_rank", "low_rank", "cola"])
def test_documents_of_one_row_are_what_each_is_alone(variant: str) -> None:
    model, tokens = _model(variant=variant).double(), torch.randint(32, (2, 9))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 2, 2, 2, 2, 2, 2, 2]])
    logits = model(tokens, documents)
    for row, number in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)):
        own = documents[row] == number
        torch.testing.assert_close(logits[row, own], model(tokens[row, own][None])[0])
