"""Fields of the model that are left out compute nothing, and those that are not compute something."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

import torch

from megatron_crnet.config.loading import resolved
from megatron_crnet.config.model_fields import computing_fields
from megatron_crnet.config.schema import VARIANTS, ModelConfig
from megatron_crnet.model.reference import ReferenceCRNet
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import ARCHITECTURES, tiny_config

OTHER: dict[str, Any] = {
    "architecture": "qwen3",
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 40,
    "num_experts": 3,
    "full_rank_experts": True,
    "moe_router_topk": 3,
    "moe_router_pre_softmax": True,
    "moe_aux_loss_coeff": 0.5,
    "moe_z_loss_coeff": 0.5,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "kv_channels": 16,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "rank": 3,
    "full_rank_layers": [1],
    "only_lr_act": True,
    "relora_scale": 3.0,
    "beta_init": 0.25,
    "cross_layer_epsilon": 0.5,
    "layernorm_epsilon": 0.5,
    "rotary_base": 77,
    "rope_scaling_factor": 2.0,
    "init_method_std": 0.5,
    "scale_residual_init": True,
    "hidden_dropout": 0.5,
    "attention_dropout": 0.5,
}
"""Values that the models below do not have."""


def computed(model: ModelConfig) -> tuple[list[torch.Size], torch.Tensor]:
    """Shapes of weights, and logits by the same ones for the same shapes, without dropout."""
    with torch.device("meta"):
        net = ReferenceCRNet(model).double()
    net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    for weight in net.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, dtype=torch.double, generator=generator)
    return [weight.shape for weight in net.parameters()], net(torch.arange(16)[None])


def test_what_is_left_out_computes_nothing() -> None:
    assert {*OTHER, "variant"} == {field.name for field in dataclasses.fields(ModelConfig)}
    tried = set()
    for architecture, variant in product(("llama", "gpt2", "qwen3_moe"), VARIANTS):
        base = {**ARCHITECTURES.get(architecture, {}), "variant": variant}
        fields = resolved(tiny_config(base))["model"]
        kept, (shapes, before) = computing_fields(fields), computed(ModelConfig(**fields))
        for name, value in OTHER.items():
            try:
                other = tiny_config({**base, name: value})
            except ConfigError:  # this model has no such field, or none of this value
                continue
            if resolved(other)["model"][name] == fields[name]:
                continue
            tried.add(name)
            other_shapes, after = computed(other.model)
            same = shapes == other_shapes and torch.equal(before, after)
            assert same == (name not in kept), (architecture, variant, name)
    assert tried == {*OTHER}
