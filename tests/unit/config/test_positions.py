from __future__ import annotations

import pytest

from megatron_crnet.config.positions import (
    FULL_RANK,
    LLAMA,
    position_table,
    resolve_full_rank_layers,
    resolve_ranks,
)
from megatron_crnet.config.schema import ModelConfig
from megatron_crnet.utils.errors import ConfigError


def test_one_integer_is_the_rank_of_every_low_rank_map() -> None:
    table, names = resolve_ranks(8, 3, [0]), LLAMA.names
    assert table == [dict.fromkeys(names, rank) for rank in (FULL_RANK, 8, 8)]


def test_a_list_gives_one_rank_a_layer_and_a_mapping_one_a_position() -> None:
    assert [row["q"] for row in resolve_ranks([1, 2, 3], 3, [])] == [1, 2, 3]
    mapping = {**dict.fromkeys(LLAMA.names, 4), "down": [5, 6, 7]}
    table = resolve_ranks(mapping, 3, [1])
    assert [row["down"] for row in table] == [5, FULL_RANK, 7]
    assert [row["up"] for row in table] == [4, FULL_RANK, 4]


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ([1, 2], "lists 2 ranks, but model.num_layers is 3"),
        ({"q": 1}, "gives no rank for the position 'k'"),
        ({**dict.fromkeys(LLAMA.names, 1), "qk": 1}, "names the position 'qk'"),
    ],
)
def test_wrong_ranks_are_refused(rank: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_ranks(rank, 3, [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variant", "given", "resolved"),
    [("crnet", None, [0]), ("low_rank", None, []), ("cola", [2], [2]), ("full_rank", None, [0, 1, 2])],
)
def test_full_rank_layers_default_by_variant(variant: str, given: list[int] | None, resolved: list[int]) -> None:
    assert resolve_full_rank_layers(variant, given, 3) == resolved


@pytest.mark.parametrize("layers", [[3], [-1], [1, 1]])
def test_wrong_full_rank_layers_are_refused(layers: list[int]) -> None:
    with pytest.raises(ConfigError):
        resolve_full_rank_layers("crnet", layers, 3)


def test_chains_start_at_the_first_and_at_full_rank_layers_of_crnet_only() -> None:
    assert position_table(ModelConfig(num_layers=4, full_rank_layers=[2])).chain_starts == {0, 2}
    assert position_table(ModelConfig(num_layers=4, variant="low_rank")).chain_starts == {0, 1, 2, 3}
    assert position_table(ModelConfig(num_layers=2, rank=7)).ranks[1]["o"] == 7
