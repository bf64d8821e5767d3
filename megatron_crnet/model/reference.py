"""CR-Net in plain PyTorch: the mathematics, with nothing distributed and nothing fused.

Source: arXiv 2509.18993. Every parallel layout and every recomputation strategy is compared with this
file, gradients included. Its parameter names are the exported ones (Hugging Face's LLaMA layout), so a
`state_dict()` of this model is the canonical form of all weights.

Shapes: b batch, s sequence, h hidden, n heads, d head width. Activations here are [b, s, h].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_crnet.config.positions import FULL_RANK, METHODS, PositionTable, position_table
from megatron_crnet.config.schema import ModelConfig
from megatron_crnet.model.glue import signed_scale


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


def apply_rope(x: Tensor, base: float, positions: Tensor | None = None) -> Tensor:
    """Rotary position embedding, rotate-half form; x: [b, n, s, d].

    Args:
        positions: of the tokens, [b, 1, s]; None counts from 0.
    """
    s, d = x.shape[-2:]
    frequencies = base ** (-torch.arange(0, d, 2, dtype=torch.float32, device=x.device) / d)
    positions = torch.arange(s, device=x.device) if positions is None else positions
    angles = positions[..., None].float() * frequencies
    cos, sin = (f(torch.cat((angles, angles), dim=-1)).to(x.dtype) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class ReferenceLayer(nn.Module):
    """A LLaMA-2 block whose seven linear maps see the previous layer's seven outputs."""

    def __init__(self, model: ModelConfig, table: PositionTable, layer: int) -> None:
        super().__init__()
        ranks, has_previous, h = table.ranks[layer], table.has_previous(layer), model.hidden_size
        self.heads, self.rope_base = model.num_attention_heads, model.rotary_base
        self.gate_has_silu = table.gate_has_silu
        self.modules_of_positions = {p.name: p.module for p in table.architecture.positions}
        maps = {p: CrossLayerLinear(*shape, ranks[p], has_previous, model) for p, shape in table.shapes.items()}
        self.self_attn = nn.ModuleDict({f"{p}_proj": maps[p] for p in "qkvo"})
        self.mlp = nn.ModuleDict({f"{p}_proj": maps[p] for p in ("gate", "up", "down")})
        self.input_layernorm = nn.RMSNorm(h, eps=model.layernorm_epsilon)
        self.post_attention_layernorm = nn.RMSNorm(h, eps=model.layernorm_epsilon)

    def forward(
        self, x: Tensor, previous: dict[str, Tensor], positions: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x: [b, s, h]. Returns the residual stream and this layer's seven linear outputs.

        Args:
            positions: see `apply_rope`.
            mask: whom a token sees, [b, 1, s, s]; None: all before it.
        """
        y: dict[str, Tensor] = {}

        def linear(position: str, value: Tensor) -> Tensor:
            y[position] = self.get_submodule(self.modules_of_positions[position])(value, previous.get(position))
            return y[position]

        normed = self.input_layernorm(x)
        q, k, v = (self._split_heads(linear(p, normed)) for p in "qkv")
        q, k = (apply_rope(y, self.rope_base, positions) for y in (q, k))
        attention = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        x = x + linear("o", attention.transpose(1, 2).flatten(2))
        normed = self.post_attention_layernorm(x)
        gate, up = linear("gate", normed), linear("up", normed)
        return x + linear("down", (F.silu(gate) if self.gate_has_silu else gate) * up), y

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.input_layernorm.weight.numel() // self.heads)).transpose(1, 2)


class ReferenceCRNet(nn.Module):
    """The whole language model, in every variant of `ModelConfig.variant`. Dropout is not part of it."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        table = position_table(model)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(model.vocab_size, model.hidden_size),
                "layers": nn.ModuleList(ReferenceLayer(model, table, layer) for layer in range(model.num_layers)),
                "norm": nn.RMSNorm(model.hidden_size, eps=model.layernorm_epsilon),
            }
        )
        self.lm_head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """tokens: [b, s]. Returns logits [b, s, vocabulary].

        Args:
            documents: number of the document of every token, [b, s], which does not fall; attention and positions stay
                within documents. None: each row is one.
        """
        x = self.model["embed_tokens"](tokens)
        positions = mask = None
        if documents is not None:
            same = documents[:, :, None] == documents[:, None, :]
            mask = same.tril()[:, None]
            positions = mask.sum(-1) - 1  # how many of its document come before a token
        outputs: dict[str, Tensor] = {}
        for layer in self.model["layers"].children():
            x, outputs = layer(x, outputs, positions, mask)
        return self.lm_head(self.model["norm"](x))

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats over all positions; labels: [b, s]."""
        return F.cross_entropy(self(tokens).float().flatten(0, 1), labels.flatten())
