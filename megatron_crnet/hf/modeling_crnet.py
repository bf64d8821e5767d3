"""CR-Net (arXiv 2509.18993) and its comparisons for Hugging Face transformers. Travels with every export.

This file needs configuration_crnet.py, linear_crnet.py, layer_crnet.py, torch and transformers alone. Weights have the
names of LLaMA, whatever the architecture; in a layer that continues a chain a linear map holds `a`, `b` and `beta` in
`weight`'s place:

    Y_l = s(beta) Y_{l-1} + X_l A B,    s(beta) = sign(beta) (|beta| + eps)

Y_{l-1} is the same token's output in the previous layer: decoding keeps only keys and values across tokens.

Shapes: b batch, s new tokens, t all tokens so far, h hidden, f feed-forward, n heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_crnet import CRNetConfig
from .layer_crnet import (
    CRNetAttention,
    CRNetDecoderLayer,
    CRNetLayers,
    CRNetRouter,
    Outputs,
    make_norm,
    rotary_embedding,
)
from .linear_crnet import CrossLayerLinear, Factor


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
        elif isinstance(module, nn.Linear | nn.Embedding | Factor | CRNetRouter):
            nn.init.normal_(module.weight, std=getattr(module, "std", self.config.initializer_range))
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            nn.init.zeros_(bias)


class CRNetModel(CRNetPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: CRNetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        is_learned = config.traits.token_positions == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if is_learned else None
        self.layers = CRNetLayers(config)
        self.norm = make_norm(config)
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
            position_ids: [b, s]; None continues from the cache, and where positions are learned from the first token
                that the attention_mask [b, t] of its row has. A position that is not its predecessor's plus one
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
            if self.embed_positions is not None and attention_mask is not None and attention_mask.dim() == 2:
                position_ids = (attention_mask.long().cumsum(-1)[:, position_ids[0]] - 1).clamp(min=0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if self.embed_positions is None:
            rotary = rotary_embedding(position_ids, self.config, x.dtype)
        else:
            rotary, x = None, x + self.embed_positions(position_ids)
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
