"""The model section of a configuration as Hugging Face's config.json, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_crnet.config.loading import resolved
from megatron_crnet.config.positions import head_width
from megatron_crnet.config.schema import Config, ModelConfig, TrainingConfig
from megatron_crnet.hf.configuration_crnet import ARCHITECTURES, FIXED, CRNetConfig
from megatron_crnet.hf.plain import FORMATS, LLAMA_FIELDS, read_plain
from megatron_crnet.utils.errors import ConfigError, DataError, require

FIELDS = {
    **LLAMA_FIELDS,
    "rope_theta": "rotary_base",
    "rope_scaling_factor": "rope_scaling_factor",
    "architecture": "architecture",
    "variant": "variant",
    "rank": "rank",
    "full_rank_layers": "full_rank_layers",
    "cross_layer_epsilon": "cross_layer_epsilon",
    "beta_init": "beta_init",
    "only_lr_act": "only_lr_act",
    "scale_residual_init": "scale_residual_init",
    "num_experts": "num_experts",
    "full_rank_experts": "full_rank_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_router_pre_softmax": "moe_router_pre_softmax",
}
"""Hugging Face's name of each field of ModelConfig; dropout and losses of routers belong to training alone."""
OLDER = {
    "architecture": "llama",
    "head_dim": None,
    "rope_scaling_factor": None,
    "only_lr_act": False,
    "scale_residual_init": False,
    "tie_word_embeddings": False,
    "num_experts": None,
    "full_rank_experts": False,
    "num_experts_per_tok": ModelConfig.moe_router_topk,
    "moe_router_pre_softmax": False,
}
"""Values in exports of versions without these fields."""
LENGTH = "max_position_embeddings"
CRNET_TYPE = "crnet"
FOREIGN = (*FIXED, "hidden_act", "attention_bias", "mlp_bias", "rope_parameters", "rope_scaling")
"""Fields of LLaMA that CRNetConfig looks at and refuses."""


def hugging_face_fields(config: Config) -> dict[str, Any]:
    """What CRNetConfig is made from.

    Raises:
        ConfigError: the model that travels with exports does not know the architecture.
    """
    model = resolved(config)["model"]
    require(
        model["architecture"] in ARCHITECTURES,
        f"model.architecture is {model['architecture']}, which is not exported yet: use {', '.join(ARCHITECTURES)}",
    )
    return {theirs: model[ours] for theirs, ours in FIELDS.items()} | {"head_dim": head_width(config.model)}


def read_export_config(folder: Path) -> Config:
    """A configuration whose model section is that of an export, `--plain` or not; every other field has its default.

    Raises:
        DataError: config.json is missing, damaged or of another kind of model.
        ConfigError: its sizes contradict each other.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
        kind = values["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is not readable ({error!r}): give a folder that to-hf or Transformers has written"
        ) from error
    if isinstance(kind, str) and kind in FORMATS:
        return read_plain(values, str(path))
    if kind != CRNET_TYPE:
        raise DataError(
            f"{path} describes a model of type {kind!r}, not {CRNET_TYPE}, {', '.join(FORMATS)}: give a folder that "
            "to-hf has written, or a model of one of these types"
        )
    values = OLDER | values
    # null, which the trainer takes for the length of its sequences, is nothing here
    length = values.get(LENGTH)
    missing = [name for name in FIELDS if name not in values]
    if missing or length is None:
        raise DataError(f"{path} has no {[*missing, LENGTH][0]}: give a folder that to-hf has written")
    fields = {ours: values[theirs] for theirs, ours in FIELDS.items()}
    if isinstance(base := fields["rotary_base"], float) and base.is_integer():
        fields["rotary_base"] = int(base)  # as LLaMA's own files spell it
    try:
        config = Config(model=ModelConfig(**fields), training=TrainingConfig(seq_length=length))
        theirs = CRNetConfig(**{name: values[name] for name in (*FIELDS, *FOREIGN) if name in values})
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{path} holds a value that does not fit ({error}): correct it") from error
    if theirs.rope_theta != values["rope_theta"]:
        raise ConfigError(
            f"{path} gives rope_theta {values['rope_theta']}, but {theirs.rope_theta} within rope_parameters: keep one"
        )
    return config
