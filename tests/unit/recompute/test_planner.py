from __future__ import annotations

import dataclasses
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch

from megatron_crnet.config.megatron import CRNetTransformerConfig, build_transformer_config
from megatron_crnet.config.schema import RecomputeConfig
from megatron_crnet.recompute.planner import (
    amplification_limit,
    cheapest_lengths,
    layer_widths,
    plan_segments,
)
from megatron_crnet.recompute.planner import (
    plan_inverse_segments as plan_inverse,
)
from tests.helpers import tiny_config


def transformer(
    strategy: Any, model: dict[str, Any] | None = None, dtype: str = "fp32", **options: Any
) -> CRNetTransformerConfig:
    config = tiny_config(model, training={"dtype": dtype})
    return build_transformer_config(dataclasses.replace(config, recompute=RecomputeConfig(strategy, **options)))


def peak(costs: list[tuple[float, float, float]], lengths: tuple[int, ...], in_flight: float) -> float:
    """What a segmentation costs, written down once more without dynamic programming."""
    kept, peaks, layer = 0.0, [], 0
    for length in lengths:
        part = costs[layer : layer + length]
        kept += part[0][0] + sum(cost[1] for cost in part)
        peaks.append(kept + sum(cost[2] for cost in part))
        layer += length
    return max(peaks) + (in_flight - 1) * kept


@pytest.mark.parametrize("in_flight", [1, 2, 4.5])
@pytest.mark.parametrize("rebuilt", [11.4, 24.0, 3.0])
def test_no_other_segmentation_has_a_lower_peak(rebuilt: float, in_flight: float) -> None:
    costs = [(1.0 if layer == 0 else 11.4, 1.75, rebuilt) for layer in range(11)]
    found = cheapest_lengths(tuple(costs), frozenset(), in_flight)
    assert sum(found) == 11
    candidates = []
    for count in range(11):
        for edges in combinations(range(1, 11), count):
            bounds = (0, *edges, 11)
            candidates.append(tuple(stop - start for start, stop in pairwise(bounds)))
    assert peak(costs, tuple(found), in_flight) == pytest.approx(min(peak(costs, c, in_flight) for c in candidates))


def test_segments_shrink_upward_because_the_ones_above_are_gone_when_one_is_rebuilt() -> None:
    lengths = cheapest_lengths(((11.4, 1.75, 11.4),) * 31, frozenset(), 1)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 2 * lengths[-1]


def test_a_full_rank_layer_is_a_segment_of_its_own_under_replay() -> None:
    config = transformer("replay", {"num_layers": 9, "full_rank_layers": [0, 4]})
    segments = plan_segments(config, range(9))
    assert [layer for segment in segments for layer in segment] == list(range(9))
    assert range(0, 1) in segments
    assert range(4, 5) in segments


def test_a_segment_length_is_obeyed_between_full_rank_layers() -> None:
    config = transformer("replay", {"num_layers": 9}, segment_length=3)
    assert plan_segments(config, range(9)) == [range(0, 1), range(1, 4), range(4, 7), range(7, 9)]
    config = transformer("full", {"num_layers": 9}, segment_length=4)
    assert plan_segments(config, range(2, 9)) == [range(2, 6), range(6, 9)]


def even(value: float = 1.0, layers: int = 32) -> dict[int, torch.Tensor]:
    """The same for every layer and position."""
    return dict.fromkeys(range(1, layers), torch.full((7,), value))


def one_position(value: float) -> torch.Tensor:
    return torch.tensor([1.0] * 6 + [value])


def test_every_eighth_layer_is_checkpointed_the_last_one_included() -> None:
    config = transformer("inverse", {"num_layers": 32})
    assert plan_inverse(config, range(32), even(), even()) == (
        [range(0, 8), range(8, 16), range(16, 24), range(24, 32)],
        0,
    )


def test_a_checkpoint_is_added_where_the_bound_would_be_passed() -> None:
    config = transformer("inverse", {"num_layers": 32})
    for scales, growth in (({20: one_position(1e-5)}, {}), ({}, {20: one_position(1e5)})):
        segments, added = plan_inverse(config, range(32), {**even(), **scales}, {**even(), **growth})
        assert added == 1
        assert range(20, 24) in segments
        assert not any(20 in segment and segment.start < 20 for segment in segments)


def test_outputs_that_grow_downward_make_up_for_small_betas() -> None:
    config = transformer("inverse", {"num_layers": 32})
    _, added = plan_inverse(config, range(32), even(0.1), even())
    assert added > 0
    assert plan_inverse(config, range(32), even(0.1), even(0.1)) == plan_inverse(config, range(32), even(), even())


def test_positions_do_not_pay_for_each_other() -> None:
    config = transformer("inverse", {"num_layers": 9}, dtype="bf16")
    one = {layer: torch.ones(7).index_fill(0, torch.tensor(layer % 7), 0.5) for layer in range(1, 9)}
    assert plan_inverse(config, range(9), one, even())[1] < plan_inverse(config, range(9), even(0.5), even())[1]


@pytest.mark.parametrize("scale", [0.0, float("nan"), 1e-30])
def test_where_nothing_can_be_inverted_every_layer_is_checkpointed(scale: float) -> None:
    config = transformer("inverse", {"num_layers": 5})
    segments, added = plan_inverse(config, range(5), even(scale), even())
    assert [len(segment) for segment in segments] == [1] * 5
    assert added == 4


def test_bf16_allows_fewer_roundings_than_fp32() -> None:
    assert amplification_limit(transformer("inverse", dtype="bf16")) == 16
    assert amplification_limit(transformer("inverse")) == pytest.approx(1e-4 * 2**24)


def test_without_a_chain_every_layer_stands_alone_under_inverse() -> None:
    config = transformer("inverse", {"variant": "cola", "num_layers": 4})
    segments, added = plan_inverse(config, range(4), {}, {})
    assert [len(segment) for segment in segments] == [1] * 4
    assert added == 0


def test_cola_keeps_silu_of_z_beside_z() -> None:
    cola, low_rank = (layer_widths(transformer("none", {"variant": name}), 1) for name in ("cola", "low_rank"))
    assert cola.z == low_rank.z > 0
    assert cola.activations == low_rank.activations + low_rank.z
