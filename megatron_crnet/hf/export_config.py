"""The model section of a configuration as Hugging Face's config.json, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_crnet.config.loading import resolved
from megatron_crnet.config.schema import Config, ModelConfig, TrainingConfig
from megatron_crnet.hf.configuration_crnet import FIXED, CRNetConfig
from megatron_crnet.utils.errors import ConfigError, DataError

FIELDS = {
    "variant": "variant",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
    "rank": "rank",
    "full_rank_layers": "full_rank_layers",
    "cross_layer_epsilon": "cross_layer_epsilon",
    "beta_init": "beta_init",
    "initializer_range": "init_method_std",
    "only_lr_act": "only_lr_act",
    "scale_residual_init": "scale_residual_init",
}
"""Hugging Face's name of each field of ModelConfig; dropout belongs to training alone."""
OLDER = {"only_lr_act": False, "scale_residual_init": False}
"""Values in exports of versions without these fields."""
LENGTH = "max_position_embeddings"
LLAMA_TYPE = "llama"
CRNET_ALONE = ("variant", "rank", "full_rank_layers", "cross_layer_epsilon", "beta_init")
LLAMA_MAY_LACK = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "initializer_range")
"""Fields that older files of LLaMA do not have; the defaults of ModelConfig are those of LlamaConfig."""
FOREIGN = (*FIXED, "head_dim", "rope_parameters", "rope_scaling")
"""Fields of LLaMA that CRNetConfig looks at and refuses."""


def hugging_face_fields(config: Config) -> dict[str, Any]:
    """What CRNetConfig is made from."""
    model = resolved(config)["model"]
    return {theirs: model[ours] for theirs, ours in FIELDS.items()}


def read_export_config(folder: Path) -> Config:
    """A configuration whose model section is that of an export or of a LLaMA; every other field has its default.

    Raises:
        DataError: config.json is missing, damaged or of another kind of model.
        ConfigError: its sizes contradict each other.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
        kind = values["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not readable ({error!r}): give a folder that to-hf has written") from error
    if kind not in ("crnet", LLAMA_TYPE):
        raise DataError(
            f"{path} describes a model of type {kind!r}, not crnet or {LLAMA_TYPE}: give a folder that to-hf has "
            "written, or a LLaMA"
        )
    if kind == LLAMA_TYPE:
        values = _full_rank(values)
    elif values.get("tie_word_embeddings"):
        raise DataError(f"{path} ties the output layer to the embedding, which no model here does: untie them")
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


def _full_rank(llama: dict[str, Any]) -> dict[str, Any]:
    """The fields of a LLaMA as those of a full-rank export."""
    ours = ModelConfig(variant="full_rank")
    absent = {name: getattr(ours, FIELDS[name]) for name in (*CRNET_ALONE, *LLAMA_MAY_LACK)}
    rotary = llama.get("rope_parameters")  # where later versions of transformers write it
    inside = {name: rotary[name] for name in ("rope_theta",) if isinstance(rotary, dict) and name in rotary}
    return {**absent, **inside, **llama}
