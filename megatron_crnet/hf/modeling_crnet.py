"""CR-Net (arXiv 2509.18993) and its comparisons for Hugging Face transformers. Travels with every export.

This file needs configuration_crnet.py, torch and transformers alone. Weights have the names of LLaMA; in a layer above
the first a linear map holds `a`, `b` and `beta` in `weight`'s place:

    Y_l = s(beta) Y_{l-1} + X_l A B,    s(beta) = sign(beta) (|beta| + eps)

Y_{l-1} is the same token's output one layer below: decoding keeps nothing across tokens but keys and values.

Shapes: b batch, s new tokens, t all tokens so far, h hidden, f feed-forward, n heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

Outputs = tuple[Tensor, ...]
"""Output of each of the seven linear positions of a layer, [b, s, width] each, in the order of POSITIONS; or empty."""


class Factor(nn.Module):
    """A or B of a low-rank map. It is no nn.Linear, so that `target_modules="all-linear"` adapts whole maps.

    Args:
        std: of its initial values.
    """

    def __init__(self, h_in: int, h_out: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(h_out, h_in))
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h_in]. Returns [b, s, h_out]."""
        return F.linear(x, self.weight)


class NoDenseWeight:
    """Stands where tools look for the matrix of an nn.Linear: they learn its device, dtype and shape, and no value.

    Raises:
        AttributeError: a tool reads or writes values, to merge, quantize or decompose what is not there.
    """

    def __init__(self, a: Tensor, shape: tuple[int, int]) -> None:
        self.device, self.dtype, self.shape = a.device, a.dtype, torch.Size(shape)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a low-rank map of CR-Net has no dense weight ({name} was asked of it): LoRA adapters merge by "
            "merge_and_unload, other changes of the matrix are not possible"
        )


class CrossLayerLinear(nn.Linear):
    """One low-rank linear map of one layer: s(beta) Y_previous + X A B, X A B, or B silu(X A).

    An nn.Linear to those who wrap linear maps, as peft does: what is added to its output is handed on to the next
    layer like the output itself.
    """

    def __init__(self, config: CRNetConfig, layer: int, position: str, h_in: int, h_out: int) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a matrix
        self.in_features, self.out_features = h_in, h_out
        self.register_parameter("bias", None)
        self.eps, self.nonlinear = config.cross_layer_epsilon, config.variant == "cola"
        rank = config.rank_of(layer, position)
        self.a = Factor(h_in, rank, h_in**-0.5)
        # A B then looks like a matrix of std initializer_range
        self.b = Factor(rank, h_out, config.initializer_range * (h_in / rank) ** 0.5)
        # fp32 in every model: a step of 1e-3 at 1 is lost in bf16
        has_previous = config.has_previous(layer)
        self.beta = nn.Parameter(torch.full((), config.beta_init, dtype=torch.float32)) if has_previous else None

    @property  # type: ignore[override]
    def weight(self) -> NoDenseWeight:
        """What there is instead of a dense matrix."""
        return NoDenseWeight(self.a.weight, (self.out_features, self.in_features))

    @weight.setter
    def weight(self, value: NoDenseWeight) -> None:
        # peft gives a module its own weight back when it takes an adapter away
        if not isinstance(value, NoDenseWeight):
            raise AttributeError("a low-rank map of CR-Net has no dense weight, and takes none: change a and b")

    def forward(self, x: Tensor, previous: Tensor | None = None) -> Tensor:
        """x: [b, s, h_in]; previous: [b, s, h_out]."""
        z = self.a(x)
        y = self.b(F.silu(z) if self.nonlinear else z)
        if self.beta is None:
            return y
        if previous is None:
            raise ValueError("this layer needs the outputs of the one before, which hands none on: keep their order")
        scale = torch.where(self.beta < 0, self.beta - self.eps, self.beta + self.eps)  # sign(0) counts as +1
        wide = torch.promote_types(y.dtype, torch.float32)
        return torch.addcmul(y.to(wide), previous.to(wide), scale.to(wide)).to(y.dtype)

    @torch.no_grad()
    def widen(self, down: Tensor, up: Tensor) -> None:
        """Add X down^T up^T to the output by more columns of A and rows of B: down [r, h_in], up [h_out, r]."""
        for factor, more, dim in ((self.a, down, 0), (self.b, up, 1)):
            old = factor.weight
            factor.weight = nn.Parameter(torch.cat((old, more.to(old)), dim), requires_grad=old.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CrossLayerLinear:
        # model.to(torch.bfloat16), model.half()
        exact = None if self.beta is None else self.beta.data
        super()._apply(fn, recurse)
        if self.beta is not None and exact is not None and self.beta.dtype in (torch.float16, torch.bfloat16):
            self.beta.data = exact.to(self.beta.device)
        return self


class FullRankLinear(nn.Linear):
    """X W, which takes no notice of the layer below."""

    def forward(self, x: Tensor, previous: Tensor | None = None) -> Tensor:
        """x: [b, s, h_in]. Returns [b, s, h_out]."""
        return F.linear(x, self.weight)


def linear_map(config: CRNetConfig, layer: int, position: str, h_in: int, h_out: int) -> nn.Linear:
    """The linear map of a position of a layer."""
    if config.rank_of(layer, position):
        return CrossLayerLinear(config, layer, position, h_in, h_out)
    return FullRankLinear(h_in, h_out, bias=False)


def rotary_embedding(position_ids: Tensor, head_width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotate-half form, [b, s, d] each, computed in fp32."""
    exponents = torch.arange(0, head_width, 2, device=position_ids.device, dtype=torch.float32) / head_width
    angles = position_ids[..., None].float() * base**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class CRNetAttention(nn.Module):
    """Causal attention whose four linear maps see those of the layer below."""

    def __init__(self, config: CRNetConfig, layer: int) -> None:
        super().__init__()
        # names that transformers' attention functions look for
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
    """SwiGLU whose three linear maps see those of the layer below."""

    def __init__(self, config: CRNetConfig, layer: int) -> None:
        super().__init__()
        h, f = config.hidden_size, config.intermediate_size
        self.gate_proj = linear_map(config, layer, "gate", h, f)
        self.up_proj = linear_map(config, layer, "up", h, f)
        self.down_proj = linear_map(config, layer, "down", f, h)

    def forward(self, x: Tensor, previous: Outputs) -> Outputs:
        """x: [b, s, h], after the norm. Returns the outputs of gate, up and down; the last is the network's."""
        before = previous[4:] or (None,) * 3
        gate, up = self.gate_proj(x, before[0]), self.up_proj(x, before[1])
        return gate, up, self.down_proj(F.silu(gate) * up, before[2])


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

    weight = None  # peft looks for that of whatever it unloads

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
        wrapped: dict[str, Any] = {n: m for n, m in self.named_modules() if isinstance(_base_layer(m), nn.Linear)}
        low_rank = {n: m for n, m in wrapped.items() if merge and isinstance(m.base_layer, CrossLayerLinear)}
        deltas = {name: list(_deltas(name, module, adapter_names)) for name, module in low_rank.items()}
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


def _base_layer(module: nn.Module) -> nn.Module | None:
    """What a module of peft's wraps."""
    return getattr(module, "base_layer", None)


def _deltas(name: str, module: Any, adapter_names: list[str] | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The two matrices of each active adapter of a wrapped map: [r, h_in], and [h_out, r] with its scale."""
    for adapter in adapter_names or module.active_adapters:
        if module.base_layer.nonlinear:
            why = "cola has a nonlinearity between A and B"
        elif not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            why = f"{type(module).__name__} is not LoRA, and the map has no dense weight"
        elif adapter not in module.lora_A:
            continue
        elif adapter in module.lora_variant or module.lora_bias.get(adapter):
            why = "it is a variant of LoRA or has a bias, and the map has no dense weight"
        else:
            down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight * module.scaling[adapter]
            if down.isfinite().all() and up.isfinite().all():
                yield down, up
                continue
            why = "its values are not finite"
        raise ValueError(f"adapter {adapter} cannot be merged into {name} ({why}): keep it beside the model")


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
            position_ids: [b, s]; None counts on from what the cache holds. Positions that do not go on by one begin
                another document, which attention does not leave (without attention_mask and cache).
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
                position_ids=position_ids,  # by which flash attention, which takes no mask, tells documents apart
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
