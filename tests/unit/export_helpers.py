"""A checkpoint written by hand, and an export of it; a small model as Hugging Face configures it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_crnet.checkpoint.directory import complete, file_entries, saved_step
from megatron_crnet.checkpoint.train_state import TrainingState
from megatron_crnet.config.loading import save_config
from megatron_crnet.config.schema import Config, DataConfig
from megatron_crnet.engine.state_kinds import KINDS
from megatron_crnet.hf.configuration_crnet import ARCHITECTURES as TRAITS
from megatron_crnet.hf.export import to_hf
from megatron_crnet.hf.plain import FORMATS
from megatron_crnet.hf.plain_weights import stored_as
from megatron_crnet.model.reference import ReferenceCRNet
from tests.helpers import ARCHITECTURES, tiny_config
from tests.unit.data_helpers import train_small_tokenizer

Weights = dict[str, Tensor]

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
"""Fields that CRNetConfig and LlamaConfig share, of a small model."""
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"architecture": "gpt2"},
    "qwen3": {"architecture": "qwen3", "head_dim": 6, "num_key_value_heads": 2},
    "qwen3_moe": {"architecture": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 20},
}
"""By architecture, what CRNetConfig has beside them."""
TWINS: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "gpt2": {
        **{"vocab_size": 64, "n_embd": 32, "n_inner": 48, "n_layer": 4, "n_head": 4, "n_positions": 64},
        **{"initializer_range": 0.2, "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False},
    },
    "qwen3": {**SHAPE, "head_dim": 6, "num_key_value_heads": 2},
}
"""The same in the words of Transformers' own classes."""
EXPORTED = {name: model for name, model in ARCHITECTURES.items() if name in TRAITS}
"""Architectures beside LLaMA that exports know, as configurations of ours."""

PLAIN_SIZES: dict[str, Any] = {
    **{"vocab_size": 416, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16},
}
PLAIN_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
ONE_EXPERT = {"num_experts_per_tok": 1, "norm_topk_prob": False}
PLAIN_GPT2 = {"vocab_size": 416, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "bos_token_id": None}
ROPE = "rope_parameters"
SCALED = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 8192}
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**PLAIN_SIZES, "rope_theta": 500000.0}),
    "llama, scaled rope": ("llama", {**PLAIN_SIZES, "head_dim": 16, ROPE: SCALED}),
    "llama, tied": ("llama", {**PLAIN_SIZES, "head_dim": 12, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {**PLAIN_GPT2, "eos_token_id": None}),
    "gpt2, untied": ("gpt2", {**PLAIN_GPT2, "eos_token_id": None, "n_inner": 40, "tie_word_embeddings": False}),
    "qwen3": ("qwen3", {**PLAIN_SIZES, "head_dim": 12, "rms_norm_eps": 1e-3}),
    "qwen3, tied": ("qwen3", {**PLAIN_SIZES, "head_dim": 6, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {**PLAIN_SIZES, **PLAIN_EXPERTS, "head_dim": 12}),
    "qwen3_moe, no head_dim": ("qwen3_moe", {**PLAIN_SIZES, **PLAIN_EXPERTS}),
    "qwen3_moe, one expert": ("qwen3_moe", {**PLAIN_SIZES, **PLAIN_EXPERTS, **ONE_EXPERT}),
}
"""Transformers' own models: `model_type`, and fields of its configuration."""


def random_weights(config: Config) -> Weights:
    torch.manual_seed(3)
    return {name: torch.randn(value.shape) * 0.2 for name, value in ReferenceCRNet(config.model).state_dict().items()}


def write_checkpoint(folder: Path, weights: Weights, config: Config) -> Path:
    """A checkpoint as two tensor-parallel ranks would write it: rows of each matrix in two files."""
    partial = folder.with_name(f".{folder.name}")
    partial.mkdir(parents=True)
    names = [f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors" for rank in range(2)]
    for rank, file in enumerate(names):
        parts: Weights = {"random.00000.cpu": torch.zeros(3, dtype=torch.uint8)} if rank == 0 else {}
        offsets: dict[str, Any] = {name: {"saved_offsets": [0]} for name in parts}
        for name, tensor in weights.items():
            if tensor.dim() < 2 and rank:
                continue
            half = len(tensor) // 2 if tensor.dim() == 2 else 0
            part = tensor if tensor.dim() < 2 else (tensor[half:] if rank else tensor[:half])
            for kind in KINDS:
                parts[f"{kind}.{name}"] = part.clone()
                start = [half * rank, 0] if tensor.dim() == 2 else [0] * tensor.dim()
                offsets[f"{kind}.{name}"] = {"saved_offsets": start}
        save_file(parts, partial / file, metadata={"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)})
    state = {**dataclasses.asdict(TrainingState(saved_step(folder))), "adam_steps": 0, "layout": {}}
    (partial / "state.json").write_text(json.dumps(state))
    save_config(config, partial / "config.yaml")
    complete(partial, folder, file_entries(partial, [*names, "state.json", "config.yaml"]))
    return folder


def write_export(folder: Path) -> Path:
    """An export of random weights in FOLDER/export."""
    tokenizer = train_small_tokenizer(folder, 400)
    config = dataclasses.replace(tiny_config(model={"vocab_size": 416}), data=DataConfig(tokenizer_model=tokenizer))
    to_hf(write_checkpoint(folder / "step_00000001", random_weights(config), config), folder / "export")
    return folder / "export"


def theirs(folder: Path, name: str, **changes: Any) -> Any:
    """A model of Transformers' own class, of random weights, in FOLDER; without a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, fields = PLAIN[name]
    fields = {**fields, **changes}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def twin_of(model: Any) -> Any:
    """Transformers' own model with the weights of a full-rank one of `SHAPES`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, weights = model.config.architecture, model.state_dict()
    config = AutoConfig.for_model(kind, **TWINS[kind], pad_token_id=0, bos_token_id=None, eos_token_id=None)
    twin = AutoModelForCausalLM.from_config(config).eval()
    about = FORMATS[kind]
    stored = stored_as(about, {name: tuple(value.shape) for name, value in weights.items()}, about.prefix)
    twin.load_state_dict({name: one.join(weights) for name, one in stored.items()})
    return twin
