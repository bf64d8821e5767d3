"""The rule of ZeRO-3 at its ends, where sums can be told by hand; in between: tests/distributed/test_estimate.py."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from megatron_crnet.config.batch import plan_batches
from megatron_crnet.config.schema import Config, RecomputeConfig
from megatron_crnet.planning.shards import LocalModel, build_local_models
from megatron_crnet.planning.zero3 import FETCH, RELEASE, Gathered, estimate_gathers, visits
from tests.helpers import tiny_config

MICRO_BATCHES = 2
HUGE = 10**9


def config(prefetch: int, live: int, reuse: int, persistent: int, strategy: str = "none") -> Config:
    options = {
        "stage": 3,
        "stage3_prefetch_bucket_size": prefetch,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": reuse,
        "stage3_param_persistence_threshold": persistent,
    }
    found = tiny_config(deepspeed_section={"zero_optimization": options})
    return dataclasses.replace(found, recompute=RecomputeConfig(strategy=strategy))


def gathered(found: Config) -> tuple[Gathered, LocalModel]:
    plan = plan_batches(found, 2)
    assert plan.num_microbatches == MICRO_BATCHES
    (model,) = build_local_models(found)
    return estimate_gathers(model, plan), model


def padded(model: LocalModel) -> int:
    return sum(p.numel + p.numel % 2 for p in model.parameters)


def test_what_is_persistent_is_gathered_once_a_step_each_by_itself() -> None:
    found, model = gathered(config(HUGE, HUGE, HUGE, HUGE))
    assert (found.calls, found.numel) == (len(model.parameters), padded(model))
    assert found.live == sum(p.numel for p in model.parameters)


def test_what_is_soon_used_again_is_gathered_once_a_micro_batch() -> None:
    found, model = gathered(config(0, HUGE, HUGE, 0))
    assert found.numel == MICRO_BATCHES * padded(model)
    assert found.live == sum(p.numel for p in model.parameters)


def test_what_never_stays_is_gathered_for_every_use() -> None:
    found, model = gathered(config(0, HUGE, 0, 0))
    assert found.numel == 2 * MICRO_BATCHES * padded(model)
    owned = Counter[str]()
    for p in model.parameters:
        owned[p.owner] += p.numel
    assert found.live == max(owned.values())
    assert found.calls == 2 * MICRO_BATCHES * len(owned)


def test_gathering_ahead_takes_fewer_calls_for_the_same_elements() -> None:
    one_by_one, _ = gathered(config(0, HUGE, 0, 0))
    ahead, _ = gathered(config(2_000, HUGE, 0, 0))
    assert ahead.numel <= one_by_one.numel
    assert ahead.calls < one_by_one.calls
    assert ahead.live > one_by_one.live
    # nothing may be whole beyond what the module at hand needs
    held_back, _ = gathered(config(2_000, 0, 0, 0))
    assert held_back == one_by_one


@pytest.mark.parametrize("key", ["stage3_max_reuse_distance", "max_reuse_distance"])
def test_deepspeeds_keys_work_with_and_without_their_prefix(key: str) -> None:
    section: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0, key: 0, "prefetch_bucket_size": 0}
    found, model = gathered(tiny_config(deepspeed_section={"zero_optimization": section}))
    assert found.numel == 2 * MICRO_BATCHES * padded(model)


@pytest.mark.parametrize("strategy", ["none", "replay", "full", "inverse"])
def test_every_weight_is_visited_as_often_as_its_layer_runs(strategy: str) -> None:
    (model,) = build_local_models(config(0, 0, 0, 0, strategy))
    order = list(visits(model, model.chunks[0]))
    owners = {p.owner for p in model.parameters}
    released = Counter(module for what, module in order if what == RELEASE and module in owners)
    again = strategy != "none"
    assert released["1.input_norm"] == 2 + again
    # the full-rank layer's products are known when it is resumed, but under `full`
    assert released["0.qkv.linear"] == 2 + (strategy == "full")
    assert owners <= {module for what, module in order if what == FETCH}
