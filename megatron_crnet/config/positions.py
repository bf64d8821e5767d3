"""Which linear map of which layer is full rank, and the rank of every other.

The seven positions of a layer are the paper's P = {q, k, v, o, gate, up, down}. A table of ranks is a
list over layers of mappings from position to rank; rank FULL_RANK marks a full-rank map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

from annotated_types import Ge, Le

from megatron_crnet.config.field_types import Rule
from megatron_crnet.utils.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_crnet.config.schema import ModelConfig

POSITIONS = ("q", "k", "v", "o", "gate", "up", "down")
GROUPS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
"""Positions that share an input, by the name of their group."""
ROW_GROUPS = ("o", "down")
"""Groups whose A is split over its inputs under tensor parallelism, as in Megatron-Core's row-parallel layers."""
MODULE_OF_POSITION = {p: f"self_attn.{p}_proj" if p in "qkvo" else f"mlp.{p}_proj" for p in POSITIONS}
"""Names of the modules in exports, those of Hugging Face's LLaMA."""
FULL_RANK = 0

RankSize = Annotated[int, Ge(1), Le(2**20)]
Rank = Annotated[
    RankSize | list[RankSize] | dict[str, RankSize | list[RankSize]],
    Rule(
        f"a rank from 1 to {2**20}, a list with one per layer, or a mapping of the positions {', '.join(POSITIONS)} to "
        "either"
    ),
]
RankTable = list[dict[str, int]]


class LayerOutputs(NamedTuple):
    """The linear outputs Y^P of a layer, before RoPE, before SiLU.

    q, k, v, gate, up: [s, b, h_out/t]; o, down: [s/t, b, h] with sequence parallelism, [s, b, h] without.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def resolve_full_rank_layers(variant: str, layers: Sequence[int] | None, num_layers: int) -> list[int]:
    """Layers with full-rank weights, in order.

    Args:
        variant: `model.variant`.
        layers: `model.full_rank_layers`; None takes the variant's default.
        num_layers: L; every entry must lie in 0 .. L-1.
    """
    if variant == "full_rank":
        if layers is not None and sorted(set(layers)) != list(range(num_layers)):
            raise ConfigError(
                f"model.full_rank_layers is {list(layers)}, but variant full_rank has only full-rank layers: "
                "leave full_rank_layers out"
            )
        return list(range(num_layers))
    if layers is None:
        return [0] if variant == "crnet" else []
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ConfigError(
                f"model.full_rank_layers holds {layer}, but the layers are numbered 0 to {num_layers - 1}: "
                "remove it or raise num_layers"
            )
    if len(set(layers)) != len(layers):
        raise ConfigError(f"model.full_rank_layers {list(layers)} names a layer twice: name each once")
    return sorted(layers)


def resolve_ranks(rank: Rank, num_layers: int, full_rank_layers: Sequence[int]) -> RankTable:
    """The rank of each position of each layer; FULL_RANK in the full-rank layers."""
    if isinstance(rank, Mapping):
        if unknown := sorted(set(rank) - set(POSITIONS)):
            raise ConfigError(
                f"model.rank names the position {unknown[0]!r}, but the positions are {', '.join(POSITIONS)}: "
                "correct the name"
            )
        if missing := [position for position in POSITIONS if position not in rank]:
            raise ConfigError(f"model.rank gives no rank for the position {missing[0]!r}: add it")
        columns = {p: _per_layer(rank[p], num_layers, f"model.rank.{p}") for p in POSITIONS}
    else:
        columns = dict.fromkeys(POSITIONS, _per_layer(rank, num_layers, "model.rank"))
    full = set(full_rank_layers)
    return [
        dict.fromkeys(POSITIONS, FULL_RANK) if layer in full else {p: columns[p][layer] for p in POSITIONS}
        for layer in range(num_layers)
    ]


def _per_layer(rank: int | Sequence[int], num_layers: int, name: str) -> list[int]:
    values = [rank] * num_layers if isinstance(rank, int) else list(rank)
    if len(values) != num_layers:
        raise ConfigError(
            f"{name} lists {len(values)} ranks, but model.num_layers is {num_layers}: give one for each layer"
        )
    return values


def model_ranks(model: ModelConfig) -> RankTable:
    """The resolved table of a model configuration."""
    full = resolve_full_rank_layers(model.variant, model.full_rank_layers, model.num_layers)
    return resolve_ranks(model.rank, model.num_layers, full)


def chain_starts(model: ModelConfig) -> set[int]:
    """Layers that use no output of the layer before: the first, the full-rank ones, all but crnet's."""
    if model.variant != "crnet":
        return set(range(model.num_layers))
    return {0, *resolve_full_rank_layers(model.variant, model.full_rank_layers, model.num_layers)}
