"""CR-Net (arXiv 2509.18993) and its comparisons for Hugging Face transformers. Travels with every export.

This file needs configuration_crnet.py, linear_crnet.py, torch and transformers alone. Weights have the names of LLaMA;
in a layer that continues a chain a linear map holds `a`, `b` and `beta` in `weight`'s place:

    Y_l = s(beta) Y_{l-1} + X_l A B,    s(beta) = sign(beta) (|beta| + eps)

Y_{l-1} is the same token's output in the previous layer: decoding keeps only keys and values across tokens.

Shapes: b batch, s new tokens, t all tokens so far, h hidden, f feed-forward, n heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_crnet import POSITIONS, CRNetConfig
from .linear_crnet import CrossLayerLinear, Factor, adapter_deltas, base_layer, linear_map

Outputs = tuple[Tensor, ...]
"""Output of each of the seven linear positions of a layer, [b, s, width] each, in the order of POSITIONS; or empty."""


def rotary_embedding(position_ids: Tensor, head_width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotate-half form, [b, s, d] each, computed in fp32."""
    exponents = torch.arange(0, head_width, 2, device=position_ids.device, dtype=torch.float32) / head_width
    angles = position_ids[..., None].float() * base**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class CRNetAttention(nn.Module):
    """Causal attention whose four linear maps take the outputs of the previous layer's."""

    def __init__(self, config: CRNetConfig, layer: int) -> None:
        super().__init__()
        # names that transformers' attention functions read
        self.config, self.layer_idx, self.is_causal = config, layer, True
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        h, kv = config.hidden_size, self.head_dim * config.num_key_value_heads
        self.q_proj = linear_map(config, layer, "q", h, h)
        self.k_proj = linear_map(config, layer, "k", h, kv)
        self.v_proj = linear_map(config, layer, "v", h, kv)
        self.o_proj = linear_map(config, layer, "o", h, h)

    def forward(
        self,
        x: Tensor,
        previous: Outputs,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Outputs, Tensor | None]:
        """x: [b, s, h], after the norm. Returns the outputs of q, k, v and o, and the probabilities if there are any.

        The output of o is the attention's.
        """
        before = previous[:4] or (None,) * 4
        y = [linear(x, p) for linear, p in zip((self.q_proj, self.k_proj, self.v_proj), before, strict=False)]
        query, key, value = (one.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for one in y)
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        found, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return (*y, self.o_proj(found.flatten(2), before[3])), weights


class CRNetMLP(nn.Module):
    """SwiGLU whose three linear maps take the outputs of the previous layer's."""

    def __init__(self, config: CRNetConfig, layer: int) -> None:
        super().__init__()
        h, f, self.gate_has_silu = config.hidden_size, config.intermediate_size, not config.only_lr_act
        self.gate_proj = linear_map(config, layer, "gate", h, f)
        self.up_proj = linear_map(config, layer, "up", h, f)
        self.down_proj = linear_map(config, layer, "down", f, h)

    def forward(self, x: Tensor, previous: Outputs) -> Outputs:
        """x: [b, s, h], after the norm. Returns the outputs of gate, up and down; the last is the network's."""
        before = previous[4:] or (None,) * 3
        gate, up = self.gate_proj(x, before[0]), self.up_proj(x, before[1])
        return gate, up, self.down_proj((F.silu(gate) if self.gate_has_silu else gate) * up, before[2])


class CRNetDecoderLayer(GradientCheckpointingLayer):
    """A LLaMA-2 block that hands its seven linear outputs to the next one."""

    def __init__(self, config: CRNetConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = CRNetAttention(config, layer)
        self.mlp = CRNetMLP(config, layer)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hands_on = layer + 1 < config.num_hidden_layers and config.has_previous(layer + 1)

    def forward(self, x: Tensor, *previous: Tensor, **attention: Any) -> tuple[Tensor, ...]:
        """x: [b, s, h]; previous: the outputs of the layer before, if this one needs them.

        Returns the residual stream, and this layer's outputs if the next one needs them. All are arguments and results
        of their own: a re-entrant checkpoint sees no tensor inside of a collection.
        """
        y, _ = self.self_attn(self.input_layernorm(x), previous, **attention)
        x = x + y[-1]
        y += self.mlp(self.post_attention_layernorm(x), previous)
        return (x + y[-1], *(y if self.hands_on else ()))


class CRNetLayers(nn.ModuleList):
    """The layers, and how peft's adapters are merged into them."""

    weight = None  # peft reads it of every module that it unloads

    def __init__(self, config: CRNetConfig) -> None:
        super().__init__(CRNetDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.config = config

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> CRNetLayers:
        """What peft calls in `merge_and_unload`: X A B + X D U is X (A D) (B U), of a higher rank and exact.

        Raises:
            ValueError: an adapter cannot be merged into a low-rank map. Nothing was changed then.
        """
        wrapped: dict[str, Any] = {n: m for n, m in self.named_modules() if isinstance(base_layer(m), nn.Linear)}
        low_rank = {n: m for n, m in wrapped.items() if merge and isinstance(m.base_layer, CrossLayerLinear)}
        deltas = {name: list(adapter_deltas(name, module, adapter_names)) for name, module in low_rank.items()}
        for name, module in wrapped.items():
            for down, up in deltas.get(name, ()):
                module.base_layer.widen(down, up)
            if merge and name not in low_rank:
                module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            parent, _, child = name.rpartition(".")
            setattr(self.get_submodule(parent), child, module.base_layer)
        if low_rank:
            self._note_ranks()
        return self

    def _note_ranks(self) -> None:
        ranks: dict[str, Any] = {position: self.config.ranks(position) for position in POSITIONS}
        for index, layer in enumerate(self):
            for module in layer.modules():
                for position in POSITIONS:
                    linear = getattr(module, f"{position}_proj", None)
                    if isinstance(linear, CrossLayerLinear):
                        ranks[position][index] = len(linear.a.weight)
        self.config.rank = ranks


class CRNetPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model family."""

    config_class = CRNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CRNetDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["beta"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": CRNetDecoderLayer, "attentions": CRNetAttention}

    def __init__(self, config: CRNetConfig, *args: Any, **kwargs: Any) -> None:
        config.check()  # from_pretrained may have changed it since it was made
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'.

        Raises:
            ValueError: the weights are to be quantized, or sharded over processes.
        """
        for name in ("quantization_config", "load_in_8bit", "load_in_4bit", "tp_plan", "tp_size", "distributed_config"):
            if kwargs.get(name):
                raise ValueError(f"{name} is given, but CR-Net is loaded neither quantized nor sharded: leave it out")
        return super().from_pretrained(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Initial values as the trainer draws them, from torch's random state."""
        if isinstance(module, CrossLayerLinear):
            if module.beta is not None:
                nn.init.constant_(module.beta, self.config.beta_init)
        elif isinstance(module, nn.Linear | nn.Embedding | Factor):
            nn.init.normal_(module.weight, std=getattr(module, "std", self.config.initializer_range))
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)


class CRNetModel(CRNetPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: CRNetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = CRNetLayers(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The hidden states, [b, s, h], after the final norm.

        Args:
            input_ids: [b, s]; or inputs_embeds, [b, s, h].
            attention_mask: [b, t], 0 for padding; or [b, 1, s, t].
            position_ids: [b, s]; None continues from the cache. A position that is not its predecessor's plus one
                begins another document, within which attention stays (without attention_mask and cache).
            kwargs: output_hidden_states, output_attentions (of eager attention) and return_dict, as LLaMA takes them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds are both given, or neither: give one of them")
        _check_options(self.config, kwargs)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        head_width = self.config.hidden_size // self.config.num_attention_heads
        rotary = rotary_embedding(position_ids, head_width, self.config.rope_theta, x.dtype)
        previous: Outputs = ()
        for layer in self.layers:
            x, *rest = layer(
                x,
                *previous,
                rotary=rotary,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,  # flash attention takes no mask and separates documents by them
                **kwargs,
            )
            previous = tuple(rest)
        return BaseModelOutputWithPast(self.norm(x), past_key_values if use_cache else None)


def _check_options(config: CRNetConfig, options: dict[str, Any]) -> None:
    """Refuse what would be ignored.

    Raises:
        ValueError: probabilities of an attention that does not give them.
        TypeError: an argument's older name.
    """
    asked = options.get("output_attentions")
    if (config.output_attentions if asked is None else asked) and config._attn_implementation != "eager":
        raise ValueError(
            f"output_attentions needs eager attention, but this model has {config._attn_implementation}: "
            'load it with attn_implementation="eager", or call set_attn_implementation("eager")'
        )
    if "num_logits_to_keep" in options:
        raise TypeError("num_logits_to_keep is called logits_to_keep: use that name")


class CRNetForCausalLM(CRNetPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: CRNetConfig) -> None:
        super().__init__(config)
        self.model = CRNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, [b, s, vocabulary], and the mean loss in nats if labels are given.

        Args:
            labels: [b, s], the input_ids with -100 where the loss does not count; shifted in here.
            logits_to_keep: only for the last that many tokens, or for these positions; 0 for all.
            kwargs: num_items_in_batch, what the summed loss is divided by instead of the labels that count;
                shift_labels; and see `CRNetModel.forward`.
        """
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss, logits, found.past_key_values, found.get("hidden_states"), found.get("attentions")
        )


class CRNetForSequenceClassification(GenericForSequenceClassification, CRNetPreTrainedModel):
    """A class for each text, from the last token that is not padding."""

    def __init__(self, config: CRNetConfig) -> None:
        # as the generic class, which would ask AutoModel for code that is here
        CRNetPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = CRNetModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
