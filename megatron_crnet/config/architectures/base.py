"""What an architecture is made of: its linear maps, and what stands between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Position:
    """One linear map of a layer.

    Attributes:
        name: in configurations.
        module: in exports, within a layer.
        h_in: width of its input: `hidden`, `query`, `key_value`, `ffn` or `expert`.
        h_out: width of its output, likewise.
    """

    name: str
    module: str
    h_in: str
    h_out: str


@dataclass(frozen=True)
class Group:
    """Positions that share an input.

    Attributes:
        is_row: A is split over its inputs under tensor parallelism, as in Megatron-Core's row-parallel layers, and
            the output is added to the residual stream. Otherwise outputs are split.
    """

    name: str
    positions: tuple[Position, ...]
    is_row: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the positions."""
        return tuple(position.name for position in self.positions)


@dataclass(frozen=True)
class Experts:
    """Feed-forward networks in every layer, of which a router chooses some for each token.

    Attributes:
        router: name of the module of its weight in exports, within a layer.
        module: of the experts, likewise; an expert is the module of its number within.
        groups: linear maps of an expert, `Position.module` within the expert; no chain passes through them.
    """

    router: str
    module: str
    groups: tuple[Group, Group]

    @property
    def positions(self) -> tuple[Position, ...]:
        """All positions of an expert."""
        return tuple(position for group in self.groups for position in group.positions)


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer: attention and a feed-forward network in every layer, a norm before each.

    Attributes:
        groups: in the order of the layer's outputs: attention's inputs, its output, and unless there are experts the
            same of the feed-forward network.
        experts: in place of one feed-forward network.
        norm: RMSNorm, or LayerNorm with a bias.
        activation: of the feed-forward network: silu(gate) up, or gelu(up) in its tanh form.
        token_positions: rotary embedding of queries and keys, or a learned vector per position.
        has_biases: a bias is added to the output of every linear map, outside of the chain: what the next layer's chain
            takes is Y, what this layer uses Y + bias.
        has_qk_norm: an RMSNorm over each head of queries and keys, before the rotary embedding.
        ties_head: default of `model.tie_word_embeddings`.
        paddable: widths that may be padded by zeros: between their positions stand only functions of single elements
            that map zeros to zeros.
    """

    groups: tuple[Group, ...]
    experts: Experts | None = None
    norm: Literal["rms", "layer"] = "rms"
    activation: Literal["swiglu", "gelu"] = "swiglu"
    token_positions: Literal["rotary", "learned"] = "rotary"
    has_biases: bool = False
    has_qk_norm: bool = False
    ties_head: bool = False
    paddable: frozenset[str] = frozenset()

    @property
    def positions(self) -> tuple[Position, ...]:
        """The positions whose outputs a layer hands on, in that order: all but those of experts."""
        return tuple(position for group in self.groups for position in group.positions)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of these positions."""
        return tuple(position.name for position in self.positions)

    @property
    def maps(self) -> tuple[Position, ...]:
        """All positions, those of an expert included."""
        return self.positions + (self.experts.positions if self.experts is not None else ())

    @property
    def all_groups(self) -> tuple[Group, ...]:
        """All groups, those of an expert included."""
        return self.groups + (self.experts.groups if self.experts is not None else ())

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the positions of row groups, whose outputs are added to the residual stream."""
        return tuple(name for group in self.groups if group.is_row for name in group.names)

    @property
    def joining(self) -> tuple[str, ...]:
        """Names of all positions whose outputs are added to the residual stream, those of experts included."""
        return tuple(name for group in self.all_groups if group.is_row for name in group.names)

    @property
    def with_kept_sums(self) -> tuple[Group, ...]:
        """Groups of which backward needs Y + bias itself: attention does, SwiGLU does, GELU adds the bias again."""
        return self.groups[0:3:2] if self.activation == "swiglu" else self.groups[:1]

    @property
    def norms(self) -> dict[str, str]:
        """By the layer's attribute, the name in exports."""
        return {**NORMS, **(QK_NORMS if self.has_qk_norm else {})}

    @property
    def attention(self) -> str:
        """The position whose input is attention's output."""
        return self.groups[1].names[0]

    @property
    def is_rotary(self) -> bool:
        """Whether queries and keys are rotated."""
        return self.token_positions == "rotary"

    @property
    def norm_suffixes(self) -> tuple[str, ...]:
        """Ends of the names of a norm's weights."""
        return ("weight", "bias") if self.norm == "layer" else ("weight",)

    def group(self, name: str) -> Group:
        """The group of this name."""
        return next(group for group in self.groups if group.name == name)

    def by_group(self, values: Sequence[T]) -> dict[str, tuple[T, ...]]:
        """One value per position, such as a layer's outputs, by the name of the group."""
        remaining = iter(values)
        return {group.name: tuple(islice(remaining, len(group.positions))) for group in self.groups}


ATTENTION = (
    Group(
        "qkv",
        (
            Position("q", "self_attn.q_proj", "hidden", "query"),
            Position("k", "self_attn.k_proj", "hidden", "key_value"),
            Position("v", "self_attn.v_proj", "hidden", "key_value"),
        ),
    ),
    Group("o", (Position("o", "self_attn.o_proj", "query", "hidden"),), is_row=True),
)
"""q, k, v and o of attention."""
DOWN = Group("down", (Position("down", "mlp.down_proj", "ffn", "hidden"),), is_row=True)
GATED = (
    Group(
        "gate_up",
        (Position("gate", "mlp.gate_proj", "hidden", "ffn"), Position("up", "mlp.up_proj", "hidden", "ffn")),
    ),
    DOWN,
)
"""gate, up and down of SwiGLU."""
EXPERTS = Experts(
    "mlp.gate",
    "mlp.experts",
    (
        Group(
            "gate_up",
            (Position("gate", "gate_proj", "hidden", "expert"), Position("up", "up_proj", "hidden", "expert")),
        ),
        Group("down", (Position("down", "down_proj", "expert", "hidden"),), is_row=True),
    ),
)
"""gate, up and down of each expert, as Qwen3-MoE's files name them."""
PLAIN = (Group("up", (Position("up", "mlp.up_proj", "hidden", "ffn"),)), DOWN)
"""up and down of a feed-forward network without a gate."""
NORMS = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
"""Before attention, and before the feed-forward network: over the residual stream."""
QK_NORMS = {"q_layernorm": "self_attn.q_norm", "k_layernorm": "self_attn.k_norm"}
"""Over each head of queries and keys."""
