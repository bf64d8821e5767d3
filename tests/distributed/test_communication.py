"""What travels, counted in real runs: the 7r layout against Megatron's sequence parallelism, and the pipeline."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_crnet.communication_report import LayerTraffic, boundary_elements, layer_traffic
from tests.distributed.spawn import run_distributed
from tests.helpers import tiny_config

H, F = 32, 48
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
NO_SP = {**TP2, "sequence_parallel": False}


def tensor_parallel_traffic() -> dict[str, LayerTraffic]:
    with_sp, without = tiny_config(parallel=TP2), tiny_config(parallel=NO_SP)
    found = {variant: layer_traffic(with_sp, variant) for variant in ("crnet", "low_rank", "cola", "full_rank")}
    return {**found, "crnet without sp": layer_traffic(without, "crnet")}


def pipeline_traffic() -> dict[str, dict[int, float]]:
    rows = {
        "pp": {"pipeline_model_parallel_size": 2},
        "vpp": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    }
    found = {name: boundary_elements(tiny_config(parallel=parallel)) for name, parallel in rows.items()}
    chained = tiny_config(model={"full_rank_layers": [0, 2]}, parallel=rows["pp"])
    return {**found, "next stage starts full rank": boundary_elements(chained)}


@pytest.fixture(scope="module")
def traffic() -> dict[str, LayerTraffic]:
    return run_distributed(tensor_parallel_traffic, 2)[0]


@pytest.fixture(scope="module")
def pipeline() -> dict[str, dict[int, float]]:
    return run_distributed(pipeline_traffic, 2)[0]


@pytest.mark.parametrize("variant", ["crnet", "low_rank", "cola"])
def test_a_low_rank_layer_sends_7r_forward_and_19r_a_step(variant: str, traffic: dict[str, LayerTraffic]) -> None:
    r = H // 4
    assert traffic[variant].forward == 7 * r == 1.75 * H
    assert traffic[variant].step == 19 * r


def test_a_full_rank_layer_sends_4h_forward_and_10h_a_step(traffic: dict[str, LayerTraffic]) -> None:
    assert traffic["full_rank"].forward == 4 * H
    assert traffic["full_rank"].step == 10 * H


def test_without_sequence_parallelism_a_step_sends_14r(traffic: dict[str, LayerTraffic]) -> None:
    r = H // 4
    assert traffic["crnet without sp"].forward == 2 * 2 * r  # all-reduce of z of o and down
    assert traffic["crnet without sp"].step == 2 * 2 * r + 2 * 5 * r  # and of dz of the other five


def test_gradients_of_replicated_factors_betas_and_norms_travel_once_a_step(traffic: dict[str, LayerTraffic]) -> None:
    r = H // 4
    assert traffic["crnet"].gradients == 2 * (7 * H * r + 7 + 2 * H)
    assert traffic["full_rank"].gradients == 2 * 2 * H


def test_a_boundary_carries_the_hidden_state_and_seven_outputs(pipeline: dict[str, dict[int, float]]) -> None:
    assert pipeline["pp"] == {0: H + 5 * H + 2 * F, 1: 0}


def test_virtual_stages_cross_three_boundaries(pipeline: dict[str, dict[int, float]]) -> None:
    width = H + 5 * H + 2 * F
    assert pipeline["vpp"] == {0: 2 * width, 1: width}


def test_only_the_hidden_state_crosses_where_the_next_stage_starts_a_chain(
    pipeline: dict[str, dict[int, float]],
) -> None:
    assert pipeline["next stage starts full rank"] == {0: H, 1: 0}
