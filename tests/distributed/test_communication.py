"""What travels, counted in real runs: the 7r layout against Megatron's sequence parallelism, and the pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_crnet.config.schema import VARIANTS
from megatron_crnet.planning.counters import CommunicationCounter, Traffic
from megatron_crnet.planning.measurements import boundary_traffic, layer_traffic
from tests.distributed.spawn import run_distributed
from tests.helpers import tiny_config

H, F = 32, 48
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
ZERO_1 = {"zero_optimization": {"stage": 1}}
NO_SP = {**TP2, "sequence_parallel": False}


def tensor_parallel_traffic() -> dict[str, dict[str, float]]:
    with_sp, without = tiny_config(parallel=TP2), tiny_config(parallel=NO_SP)
    found = {variant: layer_traffic(with_sp, variant) for variant in VARIANTS}
    in_bf16 = tiny_config(
        parallel=TP2, training={"dtype": "bf16"}, deepspeed_section={"zero_optimization": {"stage": 1}}
    )
    return {
        **found,
        "crnet without sp": layer_traffic(without, "crnet"),
        "crnet in bf16": layer_traffic(in_bf16, "crnet"),
        "calls": counted_calls(),
    }


def counted_calls() -> dict[str, Traffic]:
    """Every form in which PyTorch names tensors of a collective call, with n elements a rank."""
    n, rank = 6, dist.get_rank()
    one, both = torch.ones(n, dtype=torch.bfloat16), [torch.ones(n), torch.ones(n)]
    with CommunicationCounter() as counter:
        dist.all_gather([torch.empty(n), torch.empty(n)], both[0])
        dist.reduce_scatter(torch.empty(n), both)
        dist.all_gather_into_tensor(torch.empty(2 * n, dtype=torch.bfloat16), one)
        dist.all_to_all_single(torch.empty(n), both[0])
        received = [2, 2] if rank == 0 else [4, 4]
        dist.all_to_all_single(torch.empty(sum(received)), both[0], received, [2, 4])
        dist.send(one, 1) if rank == 0 else dist.recv(one, 0)
        dist.barrier()
    found: dict[str, Traffic] = {}
    for kind, _ in counter.traffic:
        found[kind] = counter.total(kind)
    return found


def pipeline_traffic() -> dict[str, dict[int, dict[str, float]]]:
    rows = {
        "pp": {"pipeline_model_parallel_size": 2},
        "vpp": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    }
    uneven = {**rows["pp"], "num_layers_in_first_pipeline_stage": 5}
    chained = {
        "next stage starts full rank": ({"num_layers": 8, "full_rank_layers": [0, 4]}, rows["pp"]),
        "next stage goes on": ({"num_layers": 12, "full_rank_layers": [0, 2]}, rows["pp"]),
        "uneven": ({"num_layers": 8, "full_rank_layers": [0, 5]}, uneven),
        "uneven, goes on": ({"num_layers": 8, "full_rank_layers": [0, 4]}, uneven),
        "last virtual stages start full rank": ({"num_layers": 8, "full_rank_layers": [0, 4, 6]}, rows["vpp"]),
        "all virtual stages start full rank": ({"num_layers": 8, "full_rank_layers": [0, 2, 4, 6]}, rows["vpp"]),
        "low_rank": ({"num_layers": 8, "variant": "low_rank"}, rows["pp"]),
    }
    configs = {name: tiny_config(parallel=parallel) for name, parallel in rows.items()}
    configs |= {name: tiny_config(model=model, parallel=parallel) for name, (model, parallel) in chained.items()}
    configs["bf16"] = tiny_config(parallel=rows["pp"], training={"dtype": "bf16"}, deepspeed_section=ZERO_1)
    return {name: boundary_traffic(config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def traffic() -> dict[str, dict[str, float]]:
    return run_distributed(tensor_parallel_traffic, 2)[0]


@pytest.fixture(scope="module")
def pipeline() -> dict[str, dict[int, dict[str, float]]]:
    return run_distributed(pipeline_traffic, 2)[0]


@pytest.mark.parametrize("variant", ["crnet", "low_rank", "cola"])
def test_a_low_rank_layer_sends_7r_forward_and_19r_a_step(variant: str, traffic: dict[str, dict[str, float]]) -> None:
    r = H // 4
    assert traffic[variant]["forward"] == 7 * r == 1.75 * H
    assert traffic[variant]["step"] == 19 * r


def test_a_full_rank_layer_sends_4h_forward_and_10h_a_step(traffic: dict[str, dict[str, float]]) -> None:
    assert traffic["full_rank"]["forward"] == 4 * H
    assert traffic["full_rank"]["step"] == 10 * H


def test_a_frozen_weight_saves_the_gather_for_its_gradient(traffic: dict[str, dict[str, float]]) -> None:
    r = H // 4
    assert traffic["relora"]["forward"] == 4 * H + 7 * r
    assert traffic["relora"]["step"] == 8 * H + 19 * r


def test_without_sequence_parallelism_a_step_sends_14r(traffic: dict[str, dict[str, float]]) -> None:
    r = H // 4
    assert traffic["crnet without sp"]["forward"] == 2 * 2 * r  # all-reduce of z of o and down
    assert traffic["crnet without sp"]["step"] == 2 * 2 * r + 2 * 5 * r  # and of dz of the other five


def test_gradients_of_replicated_factors_betas_and_norms_travel_once_a_step(
    traffic: dict[str, dict[str, float]],
) -> None:
    r = H // 4
    assert traffic["crnet"]["gradients"] == 2 * (7 * H * r + 7 + 2 * H)
    assert traffic["full_rank"]["gradients"] == 2 * 2 * H


def test_bytes_are_those_of_the_tensors_that_travel(traffic: dict[str, dict[str, float]]) -> None:
    assert traffic["crnet"]["step_bytes"] == 4 * traffic["crnet"]["step"]
    bf16 = traffic["crnet in bf16"]
    assert (bf16["forward_bytes"], bf16["step_bytes"]) == (2 * bf16["forward"], 2 * bf16["step"])
    assert all(bf16[name] == traffic["crnet"][name] for name in ("forward", "step", "gradients"))
    # a bf16 model sums its gradients in fp32
    assert bf16["gradients_bytes"] == 4 * bf16["gradients"]


def test_every_call_counts_all_its_tensors_under_its_kind_or_its_own_name(traffic: dict[str, Any]) -> None:
    n, calls = 6, traffic["calls"]
    assert calls["all_gather"] == Traffic(2, 2 * n + 2 * n, 4 * 2 * n + 2 * 2 * n)
    assert calls["reduce_scatter"] == Traffic(1, 2 * n, 4 * 2 * n)
    # half of the first is the rank's own, and 2 of the second
    assert calls["all_to_all"] == Traffic(2, n // 2 + n - 2, 4 * (n // 2 + n - 2))
    assert calls["send"] == Traffic(1, n, 2 * n)
    assert calls["barrier"].calls == 1


WIDTH = H + 5 * H + 2 * F
BOUNDARIES = {  # elements that pipeline ranks 0 and 1 send forward
    "pp": (WIDTH, 0),
    "vpp": (2 * WIDTH, WIDTH),
    "next stage starts full rank": (H, 0),
    "next stage goes on": (WIDTH, 0),
    "uneven": (H, 0),
    "uneven, goes on": (WIDTH, 0),
    "last virtual stages start full rank": (2 * WIDTH, WIDTH),  # padded to the widest
    "all virtual stages start full rank": (2 * H, H),
    "low_rank": (H, 0),
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_a_boundary_carries_the_hidden_state_and_seven_outputs_unless_a_chain_starts(
    name: str, pipeline: dict[str, dict[int, dict[str, float]]]
) -> None:
    assert pipeline[name] == {rank: {"elements": n, "bytes": 4 * n} for rank, n in enumerate(BOUNDARIES[name])}


def test_a_bf16_boundary_has_half_the_bytes(pipeline: dict[str, dict[int, dict[str, float]]]) -> None:
    assert pipeline["bf16"][0] == {"elements": WIDTH, "bytes": 2 * WIDTH}
