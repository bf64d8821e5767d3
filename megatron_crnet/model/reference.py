"""CR-Net in plain PyTorch: the mathematics, with nothing distributed and nothing fused.

Source: arXiv 2509.18993. Every parallel layout and every recomputation strategy is compared with this
file, gradients included. Its parameter names are the exported ones (Hugging Face's LLaMA layout), so a
`state_dict()` of this model is the canonical form of all weights.

Shapes: b batch, s sequence, h hidden, n heads, d head width. Activations here are [b, s, h].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_crnet.config.architectures import ARCHITECTURES
from megatron_crnet.config.positions import FULL_RANK, METHODS, PositionTable, head_width, position_table
from megatron_crnet.config.schema import ModelConfig
from megatron_crnet.model.glue import signed_scale

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LEARNED_POSITIONS = "model.embed_positions.weight"
"""Names of weights outside of the layers."""


class CrossLayerLinear(nn.Module):
    """One linear map of one layer: X W, s(beta) Y_prev + X A B, X A B, B silu(X A), or X W + s X A B with W frozen.

    Args:
        rank: r, or FULL_RANK.
        has_previous: whether the previous layer's output joins (then there is a beta).
    """

    def __init__(self, h_in: int, h_out: int, rank: int, has_previous: bool, model: ModelConfig) -> None:
        super().__init__()
        self.method, self.eps, self.scale = METHODS[model.variant], model.cross_layer_epsilon, model.relora_scale
        self.is_full_rank = rank == FULL_RANK
        if self.is_full_rank or self.method.has_frozen:
            self.weight = nn.Parameter(torch.empty(h_out, h_in), requires_grad=self.is_full_rank)
        if not self.is_full_rank:
            self.a = nn.Linear(h_in, rank, bias=False)
            self.b = nn.Linear(rank, h_out, bias=False)
        self.beta = nn.Parameter(torch.tensor(model.beta_init)) if has_previous else None
        has_bias = ARCHITECTURES[model.architecture].has_biases
        self.bias = nn.Parameter(torch.zeros(h_out)) if has_bias else None
        """Added to what this layer uses, not to what the next layer's chain takes."""

    def forward(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """x: [..., h_in]; previous: [..., h_out], the same map's output in the previous layer."""
        if self.is_full_rank:
            return F.linear(x, self.weight)
        z = self.a(x)
        y = self.b(F.silu(z) if self.method.has_silu else z)
        if self.method.has_frozen:
            return F.linear(x, self.weight) + self.scale * y
        if self.beta is None or previous is None:
            return y
        return (signed_scale(self.beta, self.eps) * previous + y).to(y.dtype)


def apply_rope(x: Tensor, base: float, positions: Tensor | None = None, factor: float | None = None) -> Tensor:
    """Rotary position embedding, rotate-half form; x: [b, n, s, d].

    Args:
        factor: LLaMA 3.1's scaling: waves longer than 8192 tokens are that much longer, those up to 2048 as they were,
            and frequencies between are interpolated over the number of waves in 8192 tokens.
        positions: of the tokens, [b, 1, s]; None counts from 0.
    """
    s, d = x.shape[-2:]
    frequencies = base ** (-torch.arange(0, d, 2, dtype=torch.float32, device=x.device) / d)
    if factor is not None:
        kept = ((8192 * frequencies / (2 * math.pi) - 1) / (4 - 1)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    positions = torch.arange(s, device=x.device) if positions is None else positions
    angles = positions[..., None].float() * frequencies
    cos, sin = (f(torch.cat((angles, angles), dim=-1)).to(x.dtype) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class MixtureOfExperts(nn.Module):
    """A router, and experts without a chain: y = sum over the top k of p_e down_e(silu(gate_e x) up_e x)."""

    def __init__(self, model: ModelConfig, table: PositionTable, layer: int) -> None:
        super().__init__()
        self.model, self.activates, ranks = model, table.activates, table.ranks[layer]
        self.gate = nn.Linear(model.hidden_size, table.num_experts, bias=False)
        assert table.architecture.experts is not None
        positions = table.architecture.experts.positions
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {p.module: CrossLayerLinear(*table.shapes[p.name], ranks[p.name], False, model) for p in positions}
            )
            for _ in range(table.num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h]. Keeps what `auxiliary_loss` asks for. An expert runs on the tokens that it is given."""
        self.logits = logits = self.gate(x)
        top, self.chosen = logits.topk(self.model.moe_router_topk)
        pre = self.model.moe_router_pre_softmax
        weights = logits.softmax(-1).gather(-1, self.chosen) if pre else top.softmax(-1)
        tokens, weights, y = x.flatten(0, 1), weights.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        for number, expert in enumerate(self.experts):
            token, slot = (self.chosen.flatten(0, 1) == number).nonzero(as_tuple=True)
            given = tokens[token]
            gate, up = expert["gate_proj"](given, None), expert["up_proj"](given, None)  # type: ignore[index]
            hidden = (F.silu(gate) if self.activates else gate) * up
            found = expert["down_proj"](hidden, None)  # type: ignore[index]
            y = y.index_add(0, token, weights[token, slot, None] * found)
        return y.view_as(x)

    def auxiliary_loss(self, sequences: int) -> Tensor:
        """Load balancing, E sum_e f_e P_e (arXiv 2101.03961), and z-loss (arXiv 2202.08906), with their coefficients.

        f_e is the share of expert e in what the tokens of a micro-batch were given to, P_e its mean probability.

        Args:
            sequences: of a micro-batch; the mean over micro-batches is taken.
        """
        model, losses = self.model, []
        for logits, chosen in zip(self.logits.split(sequences), self.chosen.split(sequences), strict=True):
            count = logits.shape[-1]
            share = chosen.flatten().bincount(minlength=count) / chosen.numel()
            balance = count * (share * logits.softmax(-1).flatten(0, 1).mean(0)).sum()
            z = logits.logsumexp(-1).square().mean()
            losses.append(model.moe_aux_loss_coeff * balance + model.moe_z_loss_coeff * z)
        return torch.stack(losses).mean()


class ReferenceLayer(nn.Module):
    """A layer whose linear maps see the previous layer's outputs."""

    def __init__(self, model: ModelConfig, table: PositionTable, layer: int) -> None:
        super().__init__()
        ranks, has_previous = table.ranks[layer], table.has_previous(layer)
        self.architecture, self.activates = table.architecture, table.activates
        self.head_width, self.rope_base = head_width(model), model.rotary_base
        self.rope_factor = model.rope_scaling_factor
        self.modules_of_positions = {p.name: p.module for p in self.architecture.positions}
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for position, module in self.modules_of_positions.items():
            linear = CrossLayerLinear(*table.shapes[position], ranks[position], has_previous, model)
            self.set_submodule(module, linear)
        if self.architecture.experts is not None:
            self.mlp = MixtureOfExperts(model, table, layer)
        self.input_layernorm, self.post_attention_layernorm = norm_of(model), norm_of(model)
        if self.architecture.has_qk_norm:
            self.self_attn.q_norm = nn.RMSNorm(self.head_width, eps=model.layernorm_epsilon)
            self.self_attn.k_norm = nn.RMSNorm(self.head_width, eps=model.layernorm_epsilon)

    def forward(
        self, x: Tensor, previous: dict[str, Tensor], positions: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x: [b, s, h]. Returns the residual stream and this layer's linear outputs, without biases.

        Args:
            positions: see `apply_rope`.
            mask: whom a token sees, [b, 1, s, s]; None: all before it.
        """
        y: dict[str, Tensor] = {}

        def linear(position: str, value: Tensor) -> Tensor:
            module = self.get_submodule(self.modules_of_positions[position])
            assert isinstance(module, CrossLayerLinear)
            y[position] = module(value, previous.get(position))
            return y[position] if module.bias is None else y[position] + module.bias

        normed = self.input_layernorm(x)
        q, k, v = (linear(p, normed).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for p in "qkv")
        if self.architecture.has_qk_norm:
            q, k = self.get_submodule("self_attn.q_norm")(q), self.get_submodule("self_attn.k_norm")(k)
        if self.architecture.is_rotary:
            q, k = (apply_rope(y, self.rope_base, positions, self.rope_factor) for y in (q, k))
        attention = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        x = x + linear("o", attention.transpose(1, 2).flatten(2))
        normed = self.post_attention_layernorm(x)
        if self.architecture.experts is not None:
            return x + self.mlp(normed), y
        if self.architecture.activation == "gelu":
            return x + linear("down", F.gelu(linear("up", normed), approximate="tanh")), y
        gate, up = linear("gate", normed), linear("up", normed)
        return x + linear("down", (F.silu(gate) if self.activates else gate) * up), y


def norm_of(model: ModelConfig) -> nn.Module:
    """The architecture's norm over the residual stream."""
    make = nn.LayerNorm if ARCHITECTURES[model.architecture].norm == "layer" else nn.RMSNorm
    return make(model.hidden_size, eps=model.layernorm_epsilon)


class ReferenceCRNet(nn.Module):
    """The whole language model, in every variant of `ModelConfig.variant`. Dropout is not part of it."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        table = position_table(model)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(model.vocab_size, model.hidden_size),
                "layers": nn.ModuleList(ReferenceLayer(model, table, layer) for layer in range(model.num_layers)),
                "norm": norm_of(model),
            }
        )
        if not table.architecture.is_rotary:
            assert model.max_position_embeddings is not None
            self.model["embed_positions"] = nn.Embedding(model.max_position_embeddings, model.hidden_size)
        if not table.ties_head:
            self.lm_head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        self.ties_head = table.ties_head

    def forward(self, tokens: Tensor, documents: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """tokens: [b, s]. Returns logits [b, s, vocabulary].

        Args:
            documents: number of the document of every token, [b, s], which does not fall; attention and positions stay
                within documents. None: each row is one.
            position_ids: learned positions of the tokens, [b, s]; None counts from the start of each row.
        """
        x = self.model["embed_tokens"](tokens)
        positions = mask = None
        if documents is not None:
            same = documents[:, :, None] == documents[:, None, :]
            mask = same.tril()[:, None]
            positions = mask.sum(-1) - 1  # how many of its document come before a token
        if "embed_positions" in self.model:
            counted = torch.arange(tokens.shape[1], device=tokens.device)
            x = x + self.model["embed_positions"](counted if position_ids is None else position_ids)
        outputs: dict[str, Tensor] = {}
        for layer in self.model["layers"].children():
            x, outputs = layer(x, outputs, positions, mask)
        x = self.model["norm"](x)
        return F.linear(x, self.get_parameter(EMBEDDING)) if self.ties_head else self.lm_head(x)

    def auxiliary_loss(self, sequences: int) -> Tensor:
        """Of the routers of all layers in the last call; see `MixtureOfExperts`. 0 without experts."""
        mixtures = [module for module in self.modules() if isinstance(module, MixtureOfExperts)]
        return torch.stack([torch.zeros(()), *(mixture.auxiliary_loss(sequences) for mixture in mixtures)]).sum()

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats over all positions; labels: [b, s]."""
        return F.cross_entropy(self(tokens).float().flatten(0, 1), labels.flatten())
