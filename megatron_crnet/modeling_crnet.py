"""CR-Net (arXiv 2509.18993) and its comparisons for Hugging Face transformers. Travels with every export.

This file needs torch and transformers alone. Weights have the names of LLaMA; in a layer above the first a linear
map holds `a`, `b` and `beta` in `weight`'s place:

    Y_l = s(beta) Y_{l-1} + X_l A B,    s(beta) = sign(beta) (|beta| + eps)

Y_{l-1} is the same token's output one layer below: decoding keeps nothing across tokens but keys and values.

Shapes: b batch, s new tokens, t all tokens so far, h hidden, f feed-forward, n heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

Outputs = dict[str, Tensor]
"""Output of each of the seven linear positions of a layer, [b, s, width]."""


class CRNetConfig(PretrainedConfig):
    """Shape of the model, with LlamaConfig's field names where it has them.

    Args:
        variant: crnet; low_rank: X A B; cola: B silu(X A); full_rank: X W in every layer.
        rank: an integer, a list with one for each layer, or a mapping of the positions q, k, v, o, gate, up, down
            to either.
        full_rank_layers: layers (from 0) that hold X W and start a new cross-layer chain.
        cross_layer_epsilon: eps of s(beta).
        beta_init: initial value of every beta.
    """

    model_type = "crnet"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 256,
        intermediate_size: int = 688,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 256,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000,
        initializer_range: float = 0.02,
        variant: str = "crnet",
        rank: int | list[int] | dict[str, int | list[int]] = 128,
        full_rank_layers: list[int] | None = None,
        cross_layer_epsilon: float = 1e-6,
        beta_init: float = 1.0,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self.variant = variant
        self.rank = rank
        self.full_rank_layers = [0] if full_rank_layers is None else full_rank_layers
        self.cross_layer_epsilon = cross_layer_epsilon
        self.beta_init = beta_init
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def rank_of(self, layer: int, position: str) -> int:
        """The rank r of a linear map; 0 marks full rank."""
        if layer in self.full_rank_layers:
            return 0
        rank = self.rank[position] if isinstance(self.rank, dict) else self.rank
        return rank if isinstance(rank, int) else rank[layer]

    def has_previous(self, layer: int) -> bool:
        """Whether the outputs of the layer below join those of layer `layer`."""
        return self.variant == "crnet" and layer > 0 and layer not in self.full_rank_layers


class Factor(nn.Linear):
    """A or B of a low-rank map.

    Args:
        std: of its initial values.
    """

    def __init__(self, h_in: int, h_out: int, std: float) -> None:
        super().__init__(h_in, h_out, bias=False)
        self.std = std


class CrossLayerLinear(nn.Module):
    """One linear map of one layer: X W, or s(beta) Y_previous + X A B, X A B, or B silu(X A)."""

    def __init__(self, config: CRNetConfig, layer: int, position: str, h_in: int, h_out: int) -> None:
        super().__init__()
        self.rank, self.eps, self.nonlinear = (
            config.rank_of(layer, position),
            config.cross_layer_epsilon,
            config.variant == "cola",
        )
        if self.rank:
            self.a = Factor(h_in, self.rank, h_in**-0.5)
            # A B then looks like a matrix of std initializer_range
            self.b = Factor(self.rank, h_out, config.initializer_range * (h_in / self.rank) ** 0.5)
        else:
            self.weight = nn.Parameter(torch.empty(h_out, h_in))
        # fp32 in every model: a step of 1e-3 at 1 is lost in bf16
        has_previous = config.has_previous(layer)
        self.beta = nn.Parameter(torch.full((), config.beta_init, dtype=torch.float32)) if has_previous else None

    def forward(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """x: [b, s, h_in]; previous: [b, s, h_out]."""
        if not self.rank:
            return F.linear(x, self.weight)
        z = self.a(x)
        y = self.b(F.silu(z) if self.nonlinear else z)
        if self.beta is None or previous is None:
            return y
        scale = torch.where(self.beta < 0, self.beta - self.eps, self.beta + self.eps)  # sign(0) counts as +1
        wide = torch.promote_types(y.dtype, torch.float32)
        return torch.addcmul(y.to(wide), previous.to(wide), scale.to(wide)).to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CrossLayerLinear:
        # model.to(torch.bfloat16), model.half()
        exact = None if self.beta is None else self.beta.data
        super()._apply(fn, recurse)
        if self.beta is not None and exact is not None and self.beta.dtype in (torch.float16, torch.bfloat16):
            self.beta.data = exact.to(self.beta.device)
        return self


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
        self.q_proj = CrossLayerLinear(config, layer, "q", h, h)
        self.k_proj = CrossLayerLinear(config, layer, "k", h, kv)
        self.v_proj = CrossLayerLinear(config, layer, "v", h, kv)
        self.o_proj = CrossLayerLinear(config, layer, "o", h, h)

    def forward(
        self,
        x: Tensor,
        previous: Outputs,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Outputs:
        """x: [b, s, h], after the norm. Returns the outputs of q, k, v and o; the last is the attention's."""
        y = {p: getattr(self, f"{p}_proj")(x, previous.get(p)) for p in "qkv"}
        query, key, value = (y[p].unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in "qkv")
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        found, _ = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        y["o"] = self.o_proj(found.flatten(2), previous.get("o"))
        return y


class CRNetMLP(nn.Module):
    """SwiGLU whose three linear maps see those of the layer below."""

    def __init__(self, config: CRNetConfig, layer: int) -> None:
        super().__init__()
        h, f = config.hidden_size, config.intermediate_size
        self.gate_proj = CrossLayerLinear(config, layer, "gate", h, f)
        self.up_proj = CrossLayerLinear(config, layer, "up", h, f)
        self.down_proj = CrossLayerLinear(config, layer, "down", f, h)

    def forward(self, x: Tensor, previous: Outputs) -> Outputs:
        """x: [b, s, h], after the norm. Returns the outputs of gate, up and down; the last is the network's."""
        gate, up = self.gate_proj(x, previous.get("gate")), self.up_proj(x, previous.get("up"))
        return {"gate": gate, "up": up, "down": self.down_proj(F.silu(gate) * up, previous.get("down"))}


class CRNetDecoderLayer(nn.Module):
    """A LLaMA-2 block that hands its seven linear outputs to the next one."""

    def __init__(self, config: CRNetConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = CRNetAttention(config, layer)
        self.mlp = CRNetMLP(config, layer)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, previous: Outputs, **attention: Any) -> tuple[Tensor, Outputs]:
        """x: [b, s, h]. Returns the residual stream and this layer's outputs."""
        y = self.self_attn(self.input_layernorm(x), previous, **attention)
        x = x + y["o"]
        y |= self.mlp(self.post_attention_layernorm(x), previous)
        return x + y["down"], y


class CRNetPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model family."""

    config_class = CRNetConfig
    base_model_prefix = "model"
    _no_split_modules = ["CRNetDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["beta"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        """Initial values as the trainer draws them, from torch's random state."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=getattr(module, "std", self.config.initializer_range))
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, CrossLayerLinear):
            if not module.rank:
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.beta is not None:
                nn.init.constant_(module.beta, self.config.beta_init)


class CRNetModel(CRNetPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: CRNetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(CRNetDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The hidden states, [b, s, h], after the final norm.

        Args:
            input_ids: [b, s]; or inputs_embeds, [b, s, h].
            attention_mask: [b, t], 0 for padding.
            position_ids: [b, s]; None counts on from what the cache holds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds are both given, or neither: give one of them")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
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
        states = [x]
        previous: Outputs = {}
        for layer in self.layers:
            x, previous = layer(
                x, previous, rotary=rotary, attention_mask=mask, past_key_values=past_key_values, **kwargs
            )
            states.append(x)
        x = states[-1] = self.norm(x)
        hidden_states = tuple(states) if output_hidden_states else None
        return BaseModelOutputWithPast(x, past_key_values if use_cache else None, hidden_states)


class CRNetForCausalLM(CRNetPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: CRNetConfig) -> None:
        super().__init__(config)
        self.model = CRNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, [b, s, vocabulary], and the mean loss in nats if labels are given.

        Args:
            labels: [b, s], the input_ids with -100 where the loss does not count; shifted in here.
            logits_to_keep: only for the last that many tokens, or for these positions; 0 for all.
            num_items_in_batch: what the summed loss is divided by; None takes the labels that count.
            kwargs: see `CRNetModel.forward`.
        """
        kwargs.pop("return_dict", None)
        found = self.model(input_ids, attention_mask, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(loss, logits, found.past_key_values, found.hidden_states)
