from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_crnet.config.model_size import (
    active_parameters,
    expert_parameters,
    flops_per_token,
    parameters_by_part,
    remark_on_unused_rows,
    total_parameters,
)
from megatron_crnet.config.schema import ModelConfig
from megatron_crnet.model.reference import ReferenceCRNet
from tests.helpers import ARCHITECTURES, FULL_RANK_EXPERTS, TINY_MODEL

LLAMA_1B = {"num_layers": 24, "hidden_size": 2048, "ffn_hidden_size": 5461, "num_attention_heads": 32}


def test_llama_1b_at_rank_448_has_the_papers_583_million() -> None:
    # arXiv 2509.18993 prints 583M; the formula gives 582.44M with norms and embeddings
    assert total_parameters(ModelConfig(**LLAMA_1B, rank=448)) == pytest.approx(583e6, rel=1e-3)
    assert total_parameters(ModelConfig(**LLAMA_1B, variant="full_rank")) == pytest.approx(1339.1e6, rel=1e-4)
    assert total_parameters(ModelConfig(**LLAMA_1B, variant="cola", rank=512)) == pytest.approx(609e6, rel=1e-3)


def test_crnet_has_the_formulas_count() -> None:
    h, f, layers, r = 2048, 5461, 24, 448
    formula = (4 * h * h + 3 * h * f) + (layers - 1) * (r * (11 * h + 3 * f) + 7)
    parts = parameters_by_part(ModelConfig(**LLAMA_1B, rank=r))
    assert parts["full-rank maps"] + parts["low-rank maps"] + parts["betas"] == formula


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"variant": "full_rank"},
        {"variant": "low_rank"},
        {"variant": "cola"},
        {"num_query_groups": 2},
        {"full_rank_layers": [0, 2]},
        {"full_rank_layers": []},
        {"rank": {"q": [1, 2, 3, 4], "k": 2, "v": 3, "o": 4, "gate": 5, "up": 6, "down": 7}},
        *ARCHITECTURES.values(),
        *({**ARCHITECTURES["qwen3_moe"], "variant": variant} for variant in ("full_rank", "relora")),
        *({**FULL_RANK_EXPERTS, "variant": variant} for variant in ("crnet", "relora")),
    ],
)
def test_counts_are_those_of_a_real_model(changes: dict[str, object]) -> None:
    config = ModelConfig(**{**TINY_MODEL, **changes})  # type: ignore[arg-type]
    model = ReferenceCRNet(config)
    assert total_parameters(config) == sum(p.numel() for p in model.parameters())
    assert parameters_by_part(config)["betas"] == sum(p.numel() for n, p in model.named_parameters() if "beta" in n)


@pytest.mark.parametrize("variant", ["crnet", "full_rank", "low_rank", "cola"])
def test_operations_are_those_that_torch_counts(variant: str) -> None:
    """Without attention, whose causal half the formula counts and the counter does not."""
    config = ModelConfig(**{**TINY_MODEL, "variant": variant})  # type: ignore[arg-type]
    tokens = torch.zeros(2, 16, dtype=torch.long)
    with torch.device("meta"):
        model = ReferenceCRNet(config)
    with FlopCounterMode(display=False) as counter:
        model(tokens.to("meta")).sum().backward()
    counted = counter.get_total_flops()
    products = sum(
        v for k, v in counter.get_flop_counts()["Global"].items() if "attention" not in str(k) and "bmm" not in str(k)
    )
    linear = tokens.numel() * flops_per_token(config, seq_length=0)
    # the embedding's gradient is no product, and the first layer's inputs need one all the same
    assert products == pytest.approx(linear, rel=1e-9)
    assert counted >= products


def test_qwen3_30b_has_3_billion_active_parameters() -> None:
    """Qwen3-30B-A3B has 30.5B parameters, 3.3B of them active (2505.09388, table 2)."""
    model = ModelConfig(
        **{"variant": "full_rank", "architecture": "qwen3_moe", "num_layers": 48, "hidden_size": 2048},
        **{"num_attention_heads": 32, "num_query_groups": 4, "kv_channels": 128, "ffn_hidden_size": 768},
        **{"num_experts": 128, "moe_router_topk": 8, "vocab_size": 151936},
    )
    assert total_parameters(model) == pytest.approx(30.5e9, rel=2e-3)
    assert active_parameters(model) == pytest.approx(3.35e9, rel=2e-3)
    ours = 6 * (active_parameters(model) - 151936 * 2048) / flops_per_token(model, seq_length=0)
    assert ours == pytest.approx(1.0, rel=1e-4)  # the embedding multiplies nothing, and norms are few


def test_of_frozen_experts_those_that_a_token_passes_are_active_and_multiply() -> None:
    few, all_of_them = (
        ModelConfig(**{**TINY_MODEL, **ARCHITECTURES["qwen3_moe"], "variant": "relora", "moe_router_topk": topk})
        for topk in (2, 4)
    )
    expert = few.num_layers * 3 * (32 * 20 + 8 * (32 + 20))  # W, A and B of gate, up and down
    assert expert_parameters(few) == 4 * expert
    assert active_parameters(all_of_them) == total_parameters(few)
    assert active_parameters(few) == total_parameters(few) - 2 * expert
    more = flops_per_token(all_of_them, seq_length=0) - flops_per_token(few, seq_length=0)
    assert more == 2 * few.num_layers * 3 * (4 * 32 * 20 + 6 * 8 * (32 + 20))


@pytest.mark.fault("M9")
def test_rows_that_no_token_uses_are_remarked_on_with_their_share() -> None:
    model = ModelConfig(vocab_size=32000)
    remark = remark_on_unused_rows(model, 4096)
    assert remark.startswith("14.3M of ")
    assert remark.endswith("never used: model.vocab_size is 32000, the tokenizer's largest id 4095")
    assert remark_on_unused_rows(model, 31900) == ""


@pytest.mark.fault("B22")
def test_attention_counts_its_causal_half_or_for_comparison_the_whole() -> None:
    model, s = ModelConfig(), 256
    half, whole, none = (
        flops_per_token(model, s),
        flops_per_token(model, s, whole_attention=True),
        flops_per_token(model, 0),
    )
    assert half - none == 6 * model.num_layers * model.hidden_size * s
    assert whole - none == 12 * model.num_layers * model.hidden_size * s
