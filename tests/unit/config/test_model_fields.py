"""Fields of the model that are left out compute nothing, and those that are not compute something."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_crnet.config.loading import resolved
from megatron_crnet.config.model_fields import computing_fields
from megatron_crnet.config.schema import VARIANTS, ModelConfig
from megatron_crnet.model.reference import ReferenceCRNet
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import ARCHITECTURES, tiny_config

OTHER: dict[str, Any] = {
    "architecture": "qwen3",
    "beta_init": 0.25,
    "init_method_std": 0.5,
    "scale_residual_init": True,
    "hidden_dropout": 0.5,
    "attention_dropout": 0.5,
    "moe_aux_loss_coeff": 0.5,
    "moe_z_loss_coeff": 0.5,
    "max_position_embeddings": 64,
    "rotary_base": 77.0,
    "rope_scaling_factor": 2.0,
    "rank": 3,
    "full_rank_layers": [1],
    "full_rank_experts": True,
    "cross_layer_epsilon": 0.5,
    "relora_scale": 3.0,
    "layernorm_epsilon": 0.5,
    "num_layers": 3,
    "num_query_groups": 4,
    "tie_word_embeddings": True,
    "moe_router_topk": 1,
    "moe_router_pre_softmax": True,
}
"""Values that the rows below do not have."""


def computed(model: ModelConfig) -> tuple[list[torch.Size], torch.Tensor]:
    """Shapes of weights, and logits by the same ones for the same shapes, without dropout."""
    with torch.device("meta"):
        net = ReferenceCRNet(model).double()
    net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    for weight in net.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, dtype=torch.double, generator=generator)
    return [weight.shape for weight in net.parameters()], net(torch.arange(16)[None])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_what_is_left_out_computes_nothing(architecture: str, variant: str) -> None:
    base = {**ARCHITECTURES.get(architecture, {}), "variant": variant}
    fields = resolved(tiny_config(base))["model"]
    kept, (shapes, before) = computing_fields(fields), computed(ModelConfig(**fields))
    for name, value in OTHER.items():
        try:
            other_shapes, after = computed(tiny_config({**base, name: value}).model)
        except ConfigError:  # this model has no such field
            continue
        same = shapes == other_shapes and torch.equal(before, after)
        assert same == (name not in kept or fields[name] == value), name
