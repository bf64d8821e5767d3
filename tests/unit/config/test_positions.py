from __future__ import annotations

from typing import Any

import pytest

from megatron_crnet.config.architectures import LLAMA
from megatron_crnet.config.loading import load_config
from megatron_crnet.config.positions import (
    FULL_RANK,
    padded,
    position_table,
    resolve_full_rank_layers,
    resolve_ranks,
)
from megatron_crnet.config.schema import ModelConfig
from megatron_crnet.utils.errors import ConfigError


def test_one_integer_is_the_rank_of_every_low_rank_map() -> None:
    table, names = resolve_ranks(8, 3, [0], LLAMA.names), LLAMA.names
    assert table == [dict.fromkeys(names, rank) for rank in (FULL_RANK, 8, 8)]


def test_a_list_gives_one_rank_a_layer_and_a_mapping_one_a_position() -> None:
    assert [row["q"] for row in resolve_ranks([1, 2, 3], 3, [], LLAMA.names)] == [1, 2, 3]
    mapping = {**dict.fromkeys(LLAMA.names, 4), "down": [5, 6, 7]}
    table = resolve_ranks(mapping, 3, [1], LLAMA.names)
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
        resolve_ranks(rank, 3, [], LLAMA.names)  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    ("changes", "has_silu"),
    [
        ({"variant": "cola"}, True),
        ({"variant": "cola", "hidden_size": 1024}, False),
        ({"variant": "cola", "hidden_size": 1024, "only_lr_act": False}, True),
        ({"variant": "cola", "only_lr_act": True}, False),
        ({"variant": "low_rank", "hidden_size": 1024}, True),
    ],
)
def test_colas_silu_stands_where_its_configurations_have_it(changes: dict[str, Any], has_silu: bool) -> None:
    assert position_table(ModelConfig(**changes)).activates is has_silu


def test_only_lr_act_is_colas() -> None:
    with pytest.raises(ConfigError, match="variant crnet has no silu between factors"):
        load_config({"model": {"only_lr_act": True}})


@pytest.mark.parametrize(
    ("width", "multiple", "parts", "wanted"),
    [
        (5461, 64, 1, 5504),  # 0.8% more
        (5461, 64, 2, 2752),
        (5461, 64, 8, 704),
        (2736, 64, 4, 704),  # 684: 2.9% more
        (2736, 64, 8, 352),  # 384 would be 12% more than 342, a multiple of 32 is 2.9%
        (5461, 128, 1, 5504),
        (5461, 1, 1, 5461),
        (5461, 1, 2, 2731),
        (11008, 64, 1, 11008),
        (110, 64, 1, 112),
        (96, 64, 1, 96),
        (48, 64, 1, 48),
        (31, 64, 1, 32),
        (30, 64, 1, 30),  # 32 is 6.7% more
        (7, 64, 1, 7),
        (FULL_RANK, 64, 1, FULL_RANK),
        (6400, 64, 64, 100),  # parts of 104 would leave none for the last
    ],
)
def test_a_width_is_padded_to_the_largest_multiple_that_costs_little(
    width: int, multiple: int, parts: int, wanted: int
) -> None:
    assert padded(width, multiple, parts) == wanted


def test_padding_costs_at_most_a_sixteenth_and_aligns_every_part_from_112_on() -> None:
    for width in range(1, 3000):
        found = padded(width, 64)
        assert width <= found <= width * 17 / 16
        assert found % 8 == 0 or width < 112


def test_the_table_of_a_rank_holds_what_it_computes_with_and_the_canonical_sizes() -> None:
    ranks = {**dict.fromkeys(LLAMA.names, 110), "v": 64}
    model = ModelConfig(num_layers=2, hidden_size=256, ffn_hidden_size=5461, rank=ranks)
    table = position_table(model, 2, 64)
    assert table.shapes["up"] == (256, 5461)
    assert (table.local_shapes["up"], table.local_shapes["down"]) == ((256, 2752), (2752, 256))
    assert (table.local_shapes["q"], table.local_shapes["o"]) == ((256, 128), (128, 256))
    assert (table.ranks[1]["q"], table.padded_ranks[1]["q"], table.padded_ranks[1]["v"]) == (110, 112, 64)
    assert table.padding() == [("ffn", 5461, 2, 2752), ("rank", 110, 1, 112)]
    assert position_table(model).padding() == []


@pytest.mark.parametrize(
    ("example", "tp_size", "padding"),
    [
        ("quickstart", 1, []),
        ("llama2_60m", 1, [("ffn", 1376, 1, 1408)]),
        ("llama2_1b", 1, [("ffn", 5461, 1, 5504)]),
        ("llama2_1b", 8, [("ffn", 5461, 8, 704), ("vocabulary", 32000, 8, 4032)]),
        ("llama2_7b", 1, []),
        ("llama2_7b", 4, []),
        ("llama2_7b", 8, [("ffn", 11008, 8, 1408), ("vocabulary", 32000, 8, 4032)]),
        ("gpt2_124m", 1, [("vocabulary", 50257, 1, 50304)]),
        ("gpt2_124m", 2, [("vocabulary", 50257, 2, 25152)]),
    ],
)
def test_the_examples_are_padded_where_that_helps(
    example: str, tp_size: int, padding: list[tuple[str, int, int, int]]
) -> None:
    config = load_config(f"examples/{example}.yaml")
    assert position_table(config.model, tp_size, config.parallel.pad_widths_to).padding() == padding
