"""The layers of CR-Net: attention and feed-forward networks whose linear maps see those of the layer before.

Travels with every export. This file needs configuration_crnet.py, linear_crnet.py, torch and transformers alone.

Shapes: b batch, s new tokens, h hidden, f feed-forward, n heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from .configuration_crnet import CRNetConfig
from .linear_crnet import CrossLayerLinear, adapter_deltas, base_layer, linear_map

NORMS: dict[str, type[nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
"""By `Traits.norm`."""
Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, [b, s, d] each."""
Outputs = tuple[Tensor, ...]
"""Output of each linear position of a layer, [b, s, width] each, in the order of `Traits.positions`; or empty."""


def rotary_embedding(position_ids: Tensor, config: CRNetConfig, dtype: torch.dtype) -> Rotary:
    """Cosines and sines of the rotate-half form, computed in fp32."""
    exponents = torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling_factor is not None:
        # LLaMA 3.1's: waves longer than 8192 tokens are stretched, those up to 2048 are not
        kept = ((8192 * frequencies / (2 * torch.pi) - 1) / (4 - 1)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / config.rope_scaling_factor)
    angles = position_ids[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def make_norm(config: CRNetConfig) -> nn.Module:
    """The architecture's norm over the residual stream."""
    return NORMS[config.traits.norm](config.hidden_size, eps=config.rms_norm_eps)


def used(linear: nn.Linear, y: Tensor) -> Tensor:
    """What a layer uses of the output of a linear map: with the bias, which the next layer's chain does not take."""
    return y if linear.bias is None else y + linear.bias


class CRNetAttention(nn.Module):
    """Causal attention whose four linear maps take the outputs of the previous layer's."""

    def __init__(self, config: CRNetConfig, layer: int) -> None:
        super().__init__()
        # names that transformers' attention functions read
        self.config, self.layer_idx, self.is_causal = config, layer, True
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        h, query = config.hidden_size, self.head_dim * config.num_attention_heads
        key_value = self.head_dim * config.num_key_value_heads
        self.q_proj = linear_map(config, layer, "q", h, query)
        self.k_proj = linear_map(config, layer, "k", h, key_value)
        self.v_proj = linear_map(config, layer, "v", h, key_value)
        self.o_proj = linear_map(config, layer, "o", query, h)
        if config.traits.has_qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        previous: Outputs,
        rotary: Rotary | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Outputs, Tensor | None]:
        """x: [b, s, h], after the norm. Returns the outputs of q, k, v and o, and the probabilities if there are any.

        The output of o, with its bias, is the attention's.

        Args:
            rotary: None where positions are learned.
        """
        before, maps = previous[:4] or (None,) * 4, (self.q_proj, self.k_proj, self.v_proj)
        y = [linear(x, p) for linear, p in zip(maps, before, strict=False)]
        heads = (used(*one).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for one in zip(maps, y, strict=True))
        query, key, value = heads
        if self.config.traits.has_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = apply_rotary_pos_emb(query, key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        found, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return (*y, self.o_proj(found.flatten(2), before[3])), weights


def silu_gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, of SwiGLU."""
    return F.silu(gate) * up


def gelu_tanh(up: Tensor) -> Tensor:
    """gelu(up) in its tanh form."""
    return F.gelu(up, approximate="tanh")


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"swiglu": silu_gated, "gelu": gelu_tanh}
"""By `Traits.activation`: what down is given of the outputs of gate, if there is one, and up."""


class CRNetMLP(nn.Module):
    """The feed-forward network, whose linear maps take the outputs of the previous layer's."""

    def __init__(self, config: CRNetConfig, layer: int) -> None:
        super().__init__()
        h, f, traits = config.hidden_size, config.intermediate_size, config.traits
        self.activate = torch.mul if config.only_lr_act else ACTIVATIONS[traits.activation]
        self.inner = [f"{position}_proj" for position in traits.positions[4:-1]]
        for position, name in zip(traits.positions[4:-1], self.inner, strict=True):
            self.add_module(name, linear_map(config, layer, position, h, f))
        self.down_proj = linear_map(config, layer, "down", f, h)

    def forward(self, x: Tensor, previous: Outputs) -> Outputs:
        """x: [b, s, h], after the norm. Returns the outputs of its maps; the last, with its bias, is the network's."""
        maps = [getattr(self, name) for name in self.inner]
        *before, before_down = previous[4:] or (None,) * (len(maps) + 1)
        y = [linear(x, p) for linear, p in zip(maps, before, strict=True)]
        inner = self.activate(*map(used, maps, y))
        return (*y, self.down_proj(inner, before_down))


class CRNetRouter(nn.Module):
    """Logits of the experts, in fp32 at least; no nn.Linear, so that adapters of linear maps leave it out."""

    def __init__(self, config: CRNetConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts or 0, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """x: [tokens, h]. Returns [tokens, experts]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))


class CRNetExperts(nn.Module):
    """A router, and feed-forward networks of which each token passes some: sum over its experts of p_e MLP_e(x)."""

    def __init__(self, config: CRNetConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.gate = CRNetRouter(config)
        self.experts = nn.ModuleList(CRNetMLP(config, layer) for _ in range(config.num_experts or 0))

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h], after the norm."""
        tokens = x.flatten(0, -2)
        logits = self.gate(tokens)
        top, chosen = logits.topk(self.config.num_experts_per_tok)
        pre = self.config.moe_router_pre_softmax
        weights = logits.softmax(-1).gather(-1, chosen) if pre else top.softmax(-1)
        y = torch.zeros_like(tokens)
        for number in chosen.unique().tolist():
            token, slot = (chosen == number).nonzero(as_tuple=True)
            found = self.experts[number](tokens[token], ())[-1] * weights[token, slot, None]
            y = y.index_add(0, token, found.to(y.dtype))
        return y.view_as(x)


class CRNetDecoderLayer(GradientCheckpointingLayer):
    """A block that hands its linear outputs to the next one."""

    def __init__(self, config: CRNetConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = CRNetAttention(config, layer)
        self.mlp = (CRNetExperts if config.traits.has_experts else CRNetMLP)(config, layer)
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)
        self.hands_on = layer + 1 < config.num_hidden_layers and config.has_previous(layer + 1)

    def forward(self, x: Tensor, *previous: Tensor, **attention: Any) -> tuple[Tensor, ...]:
        """x: [b, s, h]; previous: the outputs of the layer before, if this one needs them.

        Returns the residual stream, and this layer's outputs if the next one needs them. All are arguments and results
        of their own: a re-entrant checkpoint sees no tensor inside of a collection.
        """
        y, _ = self.self_attn(self.input_layernorm(x), previous, **attention)
        x = x + used(self.self_attn.o_proj, y[-1])
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, CRNetExperts):
            return (x + self.mlp(normed), *(y if self.hands_on else ()))
        y += self.mlp(normed, previous)
        return (x + used(self.mlp.down_proj, y[-1]), *(y if self.hands_on else ()))


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
        """Write them into the configuration, which has one per layer and position: of all experts the largest."""
        positions = self.config.factored
        ranks: dict[str, Any] = {position: self.config.ranks(position) for position in positions}
        for index, layer in enumerate(self):
            modules = [*layer.modules()]
            for position in positions:
                maps = [getattr(module, f"{position}_proj", None) for module in modules]
                low_rank = [one for one in maps if isinstance(one, CrossLayerLinear)]
                ranks[position][index] = max((len(one.a.weight) for one in low_rank), default=ranks[position][index])
                for one in low_rank:
                    (old, h_in), h_out = one.a.weight.shape, len(one.b.weight)
                    more = ranks[position][index] - old
                    if more:
                        one.widen(torch.zeros(more, h_in), torch.zeros(h_out, more))
        self.config.rank = ranks
