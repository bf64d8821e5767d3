"""The table of a model: ranks, widths and chains of its positions, resolved once.

A linear map of a layer is a *position* (the paper's P). Positions that share an input form a *group*. Everything that
depends on how many there are, how they are called or how wide they are asks an `Architecture`
(`config/architectures/`), or the `PositionTable` that a model configuration resolves to; the layer built from it is
`model/layer.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from megatron_crnet.config.architectures import ARCHITECTURES, LLAMA, Architecture
from megatron_crnet.config.field_types import Rule
from megatron_crnet.utils.errors import ConfigError

if TYPE_CHECKING:
    from megatron_crnet.config.schema import ModelConfig

FULL_RANK = 0
"""Rank that marks a full-rank map."""
LARGEST_PADDING = 1 / 16
"""Most that padding may add to a width, as a share of it."""
SMALLEST_MULTIPLE = 8
"""Elements of bf16 in 16 bytes, the alignment without which matrix units need slow kernels."""


RankSize = Annotated[int, Ge(1), Le(2**20)]
Rank = Annotated[
    RankSize | list[RankSize] | dict[str, RankSize | list[RankSize]],
    Rule(
        f"a rank from 1 to {2**20}, a list with one per layer, or a mapping of the architecture's positions "
        f"({', '.join(LLAMA.names)} in LLaMA) to either"
    ),
]


@dataclass(frozen=True)
class Method:
    """What a variant makes of a layer's maps.

    Attributes:
        is_chained: layers add s(beta) times the previous layer's outputs.
        is_full_rank: no map has factors.
        has_silu: silu between A and B.
        has_frozen: frozen full-rank weights beside the factors, into which these are merged.
        full_rank_layers: default of `model.full_rank_layers`.
    """

    is_chained: bool = False
    is_full_rank: bool = False
    has_silu: bool = False
    has_frozen: bool = False
    full_rank_layers: tuple[int, ...] = ()


METHODS = {
    "crnet": Method(is_chained=True, full_rank_layers=(0,)),
    "full_rank": Method(is_full_rank=True),
    "low_rank": Method(),
    "cola": Method(has_silu=True),
    "relora": Method(has_frozen=True),
}
"""By `model.variant`."""
NEEDS_TEXT = {"low_rank": False, "crnet": True, "relora": False}
"""Variants that a full-rank model is converted to (`crnet init`), and whether that takes calibration text."""
ONLY_LR_ACT_FROM = 1024
"""Hidden width of the smallest of CoLA's models (350M) whose configuration has `only_lr_act`."""


@dataclass(frozen=True)
class PositionTable:
    """What a model configuration says of every position of every layer.

    Attributes:
        ranks: by layer, the rank of each position; FULL_RANK in full-rank layers.
        chain_starts: layers (from 0) that use no output of the previous layer.
        shapes: (h_in, h_out) of each position, over all tensor-parallel ranks; of an expert's, of one expert.
        num_experts, topk: experts of a layer, and how many a token is given to; 0 without.
        vocabulary: tokens, over all tensor-parallel ranks.
        tp_size: tensor-parallel ranks.
        pad_to: see `padded`.
        method: what the maps of low-rank layers are.
        activates: silu(gate) up or gelu(up), else gate up.
        scale: what X A B is multiplied by.
        ties_head: the output layer multiplies by the embedding's weights.
    """

    architecture: Architecture = LLAMA
    ranks: tuple[Mapping[str, int], ...] = ()
    chain_starts: frozenset[int] = frozenset()
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    tp_size: int = 1
    pad_to: int = 1
    method: Method = METHODS["crnet"]
    activates: bool = True
    scale: float = 1.0
    ties_head: bool = False
    num_experts: int = 0
    topk: int = 0
    vocabulary: int = 0

    @property
    def local_vocabulary(self) -> int:
        """Rows of the embedding, and of the output layer, on one tensor-parallel rank, with padding as of a width."""
        return padded(self.vocabulary, self.pad_to, self.tp_size)

    @cached_property
    def padded_ranks(self) -> tuple[Mapping[str, int], ...]:
        """`ranks` as they are computed with."""
        return tuple({p: padded(rank, self.pad_to) for p, rank in row.items()} for row in self.ranks)

    @cached_property
    def local_shapes(self) -> Mapping[str, tuple[int, int]]:
        """(h_in, h_out) of each position but experts' on one tensor-parallel rank, with padding.

        Rank t holds elements [t n, (t + 1) n) of a split width whose local size is n; zeros where the width has ended.
        """
        found = {}
        for group in self.architecture.groups:
            for p in group.positions:
                h_in, h_out = self.shapes[p.name]
                cut = (self._local(p.h_in, h_in), h_out) if group.is_row else (h_in, self._local(p.h_out, h_out))
                found[p.name] = cut
        return found

    def _local(self, name: str, width: int) -> int:
        return padded(width, self.pad_to if name in self.architecture.paddable else 1, self.tp_size)

    def padding(self) -> list[tuple[str, int, int, int]]:
        """What is padded: `ffn`, `rank` or `vocabulary`, its size, the number of equal parts, and the size of one."""
        split = {
            (name, self.shapes[p.name][side], self.tp_size, self.local_shapes[p.name][side])
            for p in self.architecture.positions
            for side, name in enumerate((p.h_in, p.h_out))
            if name in self.architecture.paddable
        }
        ranks = {
            ("rank", rank, 1, padded_row[p])
            for row, padded_row in zip(self.ranks, self.padded_ranks, strict=True)
            for p, rank in row.items()
        }
        tokens = "vocabulary", self.vocabulary, self.tp_size, self.local_vocabulary
        return [found for found in (*sorted(split), *sorted(ranks), tokens) if found[1] != found[2] * found[3]]

    def has_previous(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) adds the outputs of the previous layer."""
        return layer not in self.chain_starts

    def has_next(self, layer: int) -> bool:
        """Whether the next layer uses the outputs of layer `layer`."""
        return layer + 1 < len(self.ranks) and self.has_previous(layer + 1)

    def is_full_rank(self, layer: int, position: str | None = None) -> bool:
        """Whether the map of a position in layer `layer` is of full rank; by default those of all but experts."""
        return self.ranks[layer][position or self.architecture.names[0]] == FULL_RANK

    def factored(self, layer: int) -> dict[str, int]:
        """The ranks of the maps of layer `layer` that have factors, in a form of `model.rank`."""
        return {p: rank for p, rank in self.ranks[layer].items() if rank != FULL_RANK}

    @property
    def last_factored(self) -> dict[str, int]:
        """`factored` of the last layer with factors; empty where none has any."""
        return next(filter(None, map(self.factored, reversed(range(len(self.ranks))))), {})

    @property
    def has_low_rank(self) -> bool:
        """Whether any layer has factors."""
        return not all(map(self.is_full_rank, range(len(self.ranks))))

    def has_dense(self, layer: int) -> bool:
        """Whether layer `layer` multiplies by full-rank weights, so that its outputs do not follow from X A alone."""
        return self.method.has_frozen or self.is_full_rank(layer)

    def position_of(self, weight: str) -> str:
        """The position whose linear map the exported weight of this name belongs to; empty for all others."""
        if weight.endswith(".bias"):
            return ""
        return next((p.name for p in self.architecture.maps if f".{p.module}." in weight), "")

    def copies(self, position: str) -> int:
        """How many maps of this position a layer has: one, or one per expert."""
        return 1 if position in self.architecture.names else self.num_experts

    def uses(self, position: str) -> int:
        """How many of them a token passes."""
        return 1 if position in self.architecture.names else self.topk


def padded(width: int, multiple: int, parts: int = 1) -> int:
    """Size of one of `parts` equal parts of a width, padded to a multiple that matrix units like.

    That is `multiple`, or the largest of its halves from 8 on by which a part grows by at most `LARGEST_PADDING`;
    every part from 112 on finds one. No part is left without an element. 1 does not pad.
    """
    part = -(-width // parts)
    while multiple >= SMALLEST_MULTIPLE:
        found = -(-part // multiple) * multiple
        if found - part <= LARGEST_PADDING * part and found * (parts - 1) < width:
            return found
        multiple //= 2
    return part


def position_table(model: ModelConfig, tp_size: int = 1, pad_to: int = 1) -> PositionTable:
    """Resolve ranks, chains and widths of a model configuration.

    Args:
        tp_size: tensor-parallel ranks.
        pad_to: `parallel.pad_widths_to`.

    Raises:
        ConfigError: `model.rank`, `model.full_rank_layers` or `model.only_lr_act` does not fit the model.
    """
    architecture, method = ARCHITECTURES[model.architecture], METHODS[model.variant]
    full = resolve_full_rank_layers(model.variant, model.full_rank_layers, model.num_layers)
    heads, width = model.num_attention_heads, head_width(model)
    widths = {
        "hidden": model.hidden_size,
        "query": width * heads,
        "key_value": width * (model.num_query_groups or heads),
        "ffn": model.ffn_hidden_size,
        "expert": model.ffn_hidden_size,
    }
    shapes = {p.name: (widths[p.h_in], widths[p.h_out]) for p in architecture.maps}
    experts = architecture.experts.positions if architecture.experts is not None else ()
    unfactored = {*shapes} if method.is_full_rank else {p.name for p in experts if model.full_rank_experts}
    ranks = resolve_ranks(model.rank, model.num_layers, full, tuple(shapes), unfactored)
    _check_sides(ranks, shapes)
    return PositionTable(
        architecture=architecture,
        ranks=tuple(ranks),
        chain_starts=frozenset({0, *full} if method.is_chained else range(model.num_layers)),
        shapes=shapes,
        tp_size=tp_size,
        pad_to=pad_to,
        method=method,
        activates=not resolve_only_lr_act(model, architecture),
        scale=model.relora_scale if method.has_frozen else 1.0,
        ties_head=ties_head(model),
        num_experts=model.num_experts or 0,
        topk=model.moe_router_topk if model.num_experts else 0,
        vocabulary=model.vocab_size,
    )


def _check_sides(ranks: Sequence[Mapping[str, int]], shapes: Mapping[str, tuple[int, int]]) -> None:
    """No rank is above the smaller side of its linear map, which A B cannot exceed."""
    for layer, row in enumerate(ranks):
        for position, rank in row.items():
            if rank > (side := min(shapes[position])):
                h_in, h_out = shapes[position]
                raise ConfigError(
                    f"model.rank is {rank} for {position} of layer {layer}, but that linear map has {h_in} inputs and "
                    f"{h_out} outputs, and no product A B has a rank above the smaller: use at most {side}"
                )


def head_width(model: ModelConfig) -> int:
    """Width d of an attention head."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def ties_head(model: ModelConfig) -> bool:
    """Whether the output layer multiplies by the embedding's weights."""
    asked = model.tie_word_embeddings
    return ARCHITECTURES[model.architecture].ties_head if asked is None else asked


def resolve_only_lr_act(model: ModelConfig, architecture: Architecture) -> bool:
    """Whether silu stands between factors alone, and not in SwiGLU: `model.only_lr_act`, or what CoLA's models have."""
    asked, is_gated = model.only_lr_act, architecture.activation == "swiglu"
    if METHODS[model.variant].has_silu and is_gated:
        return model.hidden_size >= ONLY_LR_ACT_FROM if asked is None else asked
    if asked:
        where = f"variant {model.variant}" if is_gated else f"architecture {model.architecture}"
        lacks = "no silu between factors" if is_gated else "no gate"
        raise ConfigError(f"model.only_lr_act is true, but {where} has {lacks}: leave it out, or use cola")
    return False


def resolve_full_rank_layers(variant: str, layers: Sequence[int] | None, num_layers: int) -> list[int]:
    """Layers with full-rank weights, in order.

    Args:
        variant: `model.variant`.
        layers: `model.full_rank_layers`; None takes the variant's default.
        num_layers: L; every entry must lie in 0 .. L-1.
    """
    if METHODS[variant].is_full_rank:
        if layers is not None and sorted(set(layers)) != list(range(num_layers)):
            raise ConfigError(
                f"model.full_rank_layers is {list(layers)}, but variant {variant} has only full-rank layers: "
                "leave full_rank_layers out"
            )
        return list(range(num_layers))
    if layers is None:
        return list(METHODS[variant].full_rank_layers)
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ConfigError(
                f"model.full_rank_layers holds {layer}, but the layers are numbered 0 to {num_layers - 1}: "
                "remove it or raise num_layers"
            )
    if len(set(layers)) != len(layers):
        raise ConfigError(f"model.full_rank_layers {list(layers)} names a layer twice: name each once")
    return sorted(layers)


def resolve_ranks(
    rank: Rank,
    num_layers: int,
    full_rank_layers: Sequence[int],
    names: Sequence[str],
    full_rank_names: Collection[str] = (),
) -> list[dict[str, int]]:
    """The rank of each position of each layer; FULL_RANK in the full-rank layers, and of `full_rank_names` in all.

    What `rank` says of maps of full rank is not used.
    """
    factored = [name for name in names if name not in full_rank_names]
    if isinstance(rank, Mapping):
        if unknown := sorted(set(rank) - set(names)):
            raise ConfigError(
                f"model.rank names the position {unknown[0]!r}, but the positions are {', '.join(names)}: "
                "correct the name"
            )
        if missing := [position for position in factored if position not in rank]:
            raise ConfigError(f"model.rank gives no rank for the position {missing[0]!r}: add it")
        columns = {p: _per_layer(rank[p], num_layers, f"model.rank.{p}") for p in factored}
    else:
        columns = dict.fromkeys(factored, _per_layer(rank, num_layers, "model.rank"))
    full = set(full_rank_layers)
    return [
        {p: FULL_RANK if layer in full or p in full_rank_names else columns[p][layer] for p in names}
        for layer in range(num_layers)
    ]


def _per_layer(rank: int | Sequence[int], num_layers: int, name: str) -> list[int]:
    values = [rank] * num_layers if isinstance(rank, int) else list(rank)
    if len(values) != num_layers:
        raise ConfigError(
            f"{name} lists {len(values)} ranks, but model.num_layers is {num_layers}: give one for each layer"
        )
    return values
