"""A mixture of experts: the reference against Transformers' Qwen3-MoE, and what the router counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from megatron_crnet.config.schema import ModelConfig
from megatron_crnet.model.reference import ReferenceCRNet

SIZES = {"num_attention_heads": 4, "hidden_size": 32, "vocab_size": 64, "num_experts": 5}
QWEN3 = {
    **{"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 6, "moe_intermediate_size": 12},
    **{"num_experts_per_tok": 3, "tie_word_embeddings": False, "initializer_range": 0.3, "rope_theta": 10000.0},
}
OURS = ModelConfig(
    **{"variant": "full_rank", "architecture": "qwen3_moe", "num_layers": 2, "num_query_groups": 2, "kv_channels": 6},
    **{"ffn_hidden_size": 12, "moe_router_topk": 3, "moe_aux_loss_coeff": 1.0},
    **SIZES,
)
TOKENS = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("normalised", [True, False])
def test_full_rank_is_transformers_qwen3_moe(tmp_path: Path, normalised: bool) -> None:
    torch.manual_seed(1)
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **QWEN3, norm_topk_prob=normalised)).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    theirs.save_pretrained(tmp_path)
    ours = ReferenceCRNet(ModelConfig(**{**vars(OURS), "moe_router_pre_softmax": not normalised}))
    ours.load_state_dict(load_file(tmp_path / "model.safetensors"))  # the names are those of their files
    with torch.no_grad():
        expected = theirs(TOKENS, output_router_logits=True)
        torch.testing.assert_close(ours(TOKENS), expected.logits, rtol=1e-5, atol=1e-5)
    # theirs is the mean over layers, and not divided by the experts of a token
    mean = load_balancing_loss_func(expected.router_logits[:1], 5, 3)
    torch.testing.assert_close(3 * ours.model["layers"][0].mlp.auxiliary_loss(4), mean)  # type: ignore[index]


def test_the_auxiliary_loss_is_the_mean_over_micro_batches() -> None:
    torch.manual_seed(2)
    model = ReferenceCRNet(OURS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model(TOKENS)
    whole, parts = model.auxiliary_loss(4), model.auxiliary_loss(1)
    assert float(whole) != float(parts)
    alone = []
    for row in TOKENS:
        model(row[None])
        alone.append(model.auxiliary_loss(1))
    torch.testing.assert_close(torch.stack(alone).mean(), parts)
