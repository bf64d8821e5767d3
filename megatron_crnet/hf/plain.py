"""Full-rank models as Transformers' own classes have them: a table for each architecture.

What a table does not name has its default in Transformers' class, or is of no consequence for logits. A model of ours
is written only if its own description comes back from what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_crnet.config.loading import resolved
from megatron_crnet.config.model_fields import computing_fields
from megatron_crnet.config.positions import METHODS, head_width
from megatron_crnet.config.schema import Config, ModelConfig, TrainingConfig
from megatron_crnet.utils.errors import ConfigError, describe, require

Values = Mapping[str, Any]
ROPE = "rope_parameters"
"""The mapping in which Transformers keeps what RoPE is made from; here its keys have names of their own."""


@dataclass(frozen=True)
class PlainFormat:
    """Transformers' own class of an architecture.

    Attributes:
        model_class: of the language model.
        fields: for each of its fields, the one of ModelConfig; two may be one here, and are equal then.
        negated: fields that say the contrary of one of ModelConfig.
        only: fields of which some values, the first one by default, are what the architecture is here.
        absent: what a field means that is null.
        prefix: of all weights but the output layer's; files of the model without that layer have none.
        layers: what `layers` is called.
        modules: their names of modules within the model or a layer, by ours; several of ours may be one, joined by
            rows. Others have the same name.
        transposed: their modules whose weight is [in, out].
        buffers: ends of names in some files that are no weights.
    """

    model_class: str
    fields: Mapping[str, str]
    only: Mapping[str, tuple[Any, ...]]
    negated: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, Callable[[Values], Any]] = field(default_factory=dict)
    prefix: str = "model."
    layers: str = "layers"
    modules: Mapping[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    buffers: tuple[str, ...] = ()


ANYWHERE = {"tie_word_embeddings": "tie_word_embeddings", "vocab_size": "vocab_size"}
LLAMA_FIELDS = {
    **ANYWHERE,
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_method_std",
}
"""Of LLaMA, what followed it, and exports of this project."""
ROTARY_FIELDS = {
    **LLAMA_FIELDS,
    f"{ROPE}.rope_theta": "rotary_base",
    f"{ROPE}.factor": "rope_scaling_factor",
    "attention_dropout": "attention_dropout",
}
"""Of LLaMA and what followed it."""
ROTARY_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "sliding_window": (None,),
    "quantization_config": (None,),
    f"{ROPE}.rope_type": ("default", "llama3"),
    f"{ROPE}.partial_rotary_factor": (None, 1.0),
}
SCALED_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Beside the factor, what rope_type llama3 is made from: LLaMA 3.1's and 3.2's numbers, which Megatron-Core has."""
FORMATS = {
    "llama": PlainFormat(
        "LlamaForCausalLM",
        ROTARY_FIELDS,
        {**ROTARY_ONLY, "mlp_bias": (False,), "pretraining_tp": (1,)},
        buffers=(".rotary_emb.inv_freq",),
    ),
    "gpt2": PlainFormat(
        "GPT2LMHeadModel",
        {
            **ANYWHERE,
            "n_embd": "hidden_size",
            "n_inner": "ffn_hidden_size",
            "n_layer": "num_layers",
            "n_head": "num_attention_heads",
            "n_positions": "max_position_embeddings",
            "layer_norm_epsilon": "layernorm_epsilon",
            "initializer_range": "init_method_std",
            "resid_pdrop": "hidden_dropout",
            "embd_pdrop": "hidden_dropout",
            "attn_pdrop": "attention_dropout",
        },
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
            "quantization_config": (None,),
        },
        absent={"n_inner": lambda values: 4 * values["n_embd"]},
        prefix="transformer.",
        layers="h",
        modules={
            "embed_tokens": "wte",
            "embed_positions": "wpe",
            "norm": "ln_f",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "self_attn.q_proj": "attn.c_attn",
            "self_attn.k_proj": "attn.c_attn",
            "self_attn.v_proj": "attn.c_attn",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
    "qwen3": PlainFormat(
        "Qwen3ForCausalLM",
        ROTARY_FIELDS,
        {**ROTARY_ONLY, "use_sliding_window": (False,), "layer_types": (None, "full_attention")},
    ),
    "qwen3_moe": PlainFormat(
        "Qwen3MoeForCausalLM",
        {
            **{name: ours for name, ours in ROTARY_FIELDS.items() if name != "intermediate_size"},
            "moe_intermediate_size": "ffn_hidden_size",
            "num_local_experts": "num_experts",
            "num_experts_per_tok": "moe_router_topk",
        },
        {
            **ROTARY_ONLY,
            "use_sliding_window": (False,),
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([],),  # an empty list names no layer
        },
        negated={"norm_topk_prob": "moe_router_pre_softmax"},
    ),
}
"""By `model.architecture`, which is Transformers' `model_type` as well."""


def read_plain(values: Values, where: str) -> Config:
    """A configuration whose model section is that of a model of Transformers' own classes; all else has its default.

    Args:
        values: of its config.json.
        where: names that file in messages.

    Raises:
        ConfigError: Transformers does not take the values, or the model has what its architecture lacks here.
    """
    from transformers import AutoConfig

    kind = values["model_type"]
    about = FORMATS[kind]
    try:
        theirs = AutoConfig.for_model(**values).to_dict()
    except Exception as error:  # whatever it raises on values of other types
        raise ConfigError(
            f"{where} holds a value that {about.model_class} refuses ({describe(error)}): correct it"
        ) from error
    theirs |= _rotary_fields(theirs.get(ROPE) or {}, where)
    for name, allowed in about.only.items():
        value = theirs.get(name, allowed[0])
        require(
            all(one in allowed for one in (value if isinstance(value, list) else [value])),
            f"{where} says that {name} is {value!r}, but a {kind} has {' or '.join(map(repr, allowed))} here: give a "
            "model without that",
        )
    found: dict[str, Any] = {}
    for name, ours in about.fields.items():
        value = theirs.get(name)
        if value is None and name in about.absent:
            value = about.absent[name](theirs)
        first = found.setdefault(ours, value)
        require(
            first is value or first == value,
            f"{where} says that {name} is {value!r}, but another field {first!r}, and both are model.{ours}: "
            "make them equal",
        )
    found |= {ours: not theirs[name] for name, ours in about.negated.items()}
    require(
        found.get("moe_router_topk") != 1 or found["moe_router_pre_softmax"],
        f"{where} says that num_experts_per_tok is 1, whose normalised weight is 1 whatever the router says: give a "
        "model with at least 2, or with norm_topk_prob false",
    )
    if isinstance(base := found.get("rotary_base"), float) and base.is_integer():
        found["rotary_base"] = int(base)  # as LLaMA's own files spell it
    try:
        model = ModelConfig(architecture=kind, variant="full_rank", **found)
        return Config(model=model, training=TrainingConfig(seq_length=found["max_position_embeddings"]))
    except (TypeError, ValueError, ConfigError) as error:
        raise ConfigError(f"{where} holds a value that does not fit ({error}): correct it") from error


def _rotary_fields(rotary: Values, where: str) -> dict[str, Any]:
    """What RoPE is made from by the names of `ROTARY_FIELDS`; a factor only where it is LLaMA 3.1's."""
    is_scaled = rotary.get("rope_type") == "llama3"
    require(
        not is_scaled or rotary.get("factor") is not None,
        f"{where} says that rope_type is 'llama3', but gives no factor: add it",
    )
    for name, number in SCALED_ROPE.items() if is_scaled else ():
        require(
            rotary.get(name) == number,
            f"{where} says that {name} is {rotary.get(name)!r}, but it is {number} here: give a model with that",
        )
    return {f"{ROPE}.{name}": value for name, value in rotary.items() if name != "factor" or is_scaled}


def plain_fields(config: Config) -> dict[str, Any]:
    """What Transformers' own class of a full-rank model is made from.

    Raises:
        ConfigError: the model is not full rank, or has what that class lacks.
    """
    before = resolved(config)["model"]
    kind, variant = before["architecture"], before["variant"]
    require(
        kind in FORMATS,
        f"model.architecture {kind} has no class in Transformers that is known here: leave out --plain",
    )
    about = FORMATS[kind]
    require(
        METHODS[variant].is_full_rank,
        f"model.variant is {variant}, but a {about.model_class} holds full-rank weights: leave out --plain",
    )
    before["kv_channels"] = head_width(config.model)
    fields: dict[str, Any] = {"model_type": kind, **{name: allowed[0] for name, allowed in about.only.items()}}
    fields |= {name: before[ours] for name, ours in about.fields.items()}
    fields |= {name: not before[ours] for name, ours in about.negated.items()}
    if f"{ROPE}.rope_theta" in fields:
        names = [name for name in fields if name.startswith(ROPE)]
        rotary = {name.removeprefix(f"{ROPE}."): fields.pop(name) for name in names}
        if rotary["factor"] is not None:
            rotary |= {"rope_type": "llama3", **SCALED_ROPE}
        # and where earlier versions of Transformers, and other engines, read it
        fields |= {ROPE: {k: v for k, v in rotary.items() if v is not None}, "rope_theta": rotary["rope_theta"]}
        fields["rope_scaling"] = fields[ROPE] if rotary["factor"] is not None else None
    fields = {name: value for name, value in fields.items() if value is not None}
    try:
        after = resolved(read_plain(fields, "what --plain would write"))["model"]
    except ConfigError as error:
        raise ConfigError(f"{error}, or leave out --plain") from error
    after["kv_channels"] = head_width(ModelConfig(**after))
    for name, value in computing_fields(before).items():
        require(
            value == after[name],
            f"model.{name} is {value}, but {after[name]} in every {about.model_class} of these sizes: leave out "
            "--plain",
        )
    return fields
