"""The search: what it tries, drops, ranks and says, how it stops, and that its file is a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_crnet.config.loading import load_config, save_config
from megatron_crnet.config.recompute_section import RecomputeConfig
from megatron_crnet.config.schema import Config
from megatron_crnet.planning.estimate import estimate
from megatron_crnet.planning.machines import MACHINES, Machine
from megatron_crnet.planning.search import (
    DISPATCHERS,
    RESERVE,
    Choice,
    Plan,
    Search,
    choices,
    configure,
    explain,
    search,
    uneven_stages,
)
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import ARCHITECTURES, tiny_config

H100 = MACHINES["h100"]


@pytest.fixture(scope="module")
def config() -> Config:
    return tiny_config(training={"dtype": "bf16", "global_batch_size": 8})


@pytest.fixture(scope="module")
def found(config: Config) -> Search:
    return search(config, 4, H100, 2)


def test_every_candidate_is_accounted_for(config: Config, found: Search) -> None:
    assert found.tried == found.total == len(choices(config, 4, 2))
    assert found.refused + found.too_large + len(found.fitting) == found.tried
    assert found.refused > 0  # virtual stages that divide no layers, keeping attention without recomputation


def test_the_search_covers_every_dimension(found: Search) -> None:
    for name, values in {
        "tp": {1, 2},
        "pp": {1, 2, 4},
        "vpp": {1, 2},
        "zero": {1, 2, 3},
        "recompute": {"none", "replay", "replay, attention kept", "full"},
        "offload": {False, True},
    }.items():
        assert {getattr(plan.choice, name) for plan in found.fitting} == values, name


def test_stage_0_is_tried_where_it_sums_in_fp32() -> None:
    assert {choice.zero for choice in choices(tiny_config(), 2, 2)} == {0, 1, 2, 3}


def test_experts_that_are_spread_are_so_as_asked_or_over_tensor_parallel_ranks() -> None:
    def eps(asked: int) -> set[tuple[int, int]]:
        config = tiny_config(ARCHITECTURES["qwen3_moe"], {"expert_model_parallel_size": asked})
        return {(choice.tp, choice.ep) for choice in choices(config, 4, 4)}

    assert eps(1) == {(1, 1), (2, 1), (4, 1)}
    assert eps(2) == {(1, 1), (1, 2), (2, 2), (4, 2), (4, 4)}
    choice = Choice(1, 1, 1, 1, 1, "none", offload=False, ep=2, dispatcher="alltoall")
    spread = configure(tiny_config(ARCHITECTURES["qwen3_moe"]), choice).parallel
    assert (spread.expert_model_parallel_size, spread.moe_token_dispatcher_type) == (2, "alltoall")


def test_tokens_go_to_few_ranks_by_all_gather_and_to_many_by_all_to_all() -> None:
    def fastest(ep: int) -> str:
        moe = load_config("examples/qwen3_30b_a3b.yaml", [f"--parallel.expert_model_parallel_size={ep}"])
        found = [configure(moe, Choice(1, 1, 1, 1, 1, "replay", False, ep, way)) for way in DISPATCHERS]
        rated = {c.parallel.moe_token_dispatcher_type: estimate(c, 8, H100).tokens_per_second for c in found}
        return max(rated, key=lambda way: rated[way])

    # of 8 experts per token each takes 2 bytes per element there and back, a gathered token 2 there and 4 back
    assert [fastest(ep) for ep in (2, 4, 8)] == ["allgather", "allgather", "alltoall"]


def test_the_fastest_is_first_and_everything_fits(found: Search) -> None:
    speeds = [plan.estimate.tokens_per_second for plan in found.ranked()]
    assert speeds == sorted(speeds, reverse=True)
    assert all(plan.estimate.peak <= (1 - RESERVE) * H100.memory_bytes for plan in found.fitting)


def test_what_does_not_fit_is_dropped(config: Config, found: Search) -> None:
    sizes = sorted(plan.estimate.peak for plan in found.fitting)
    small: Machine = dataclasses.replace(H100, memory_bytes=sizes[len(sizes) // 2] / (1 - RESERVE) + 1)
    less = search(config, 4, small, 2)
    assert 0 < len(less.fitting) < len(found.fitting)
    assert less.too_large == len(found.fitting) - len(less.fitting)
    none = search(config, 4, dataclasses.replace(H100, memory_bytes=1), 2)
    assert not none.fitting
    assert none.least is not None
    assert none.least.estimate.peak == sizes[0]


def test_the_first_choice_is_explained_in_every_dimension(found: Search) -> None:
    lines = explain(found)
    names = [field.name for field in dataclasses.fields(Choice)]
    for line, name in zip(lines, names[: names.index("ep")], strict=True):
        assert line.startswith(f"{name} {getattr(found.ranked()[0].choice, name)}: ")
        assert any(words in line for words in ("of its tokens/s", "is as fast", "no plan with another value"))


def test_ctrl_c_keeps_what_was_found(config: Config) -> None:
    def interrupted(candidates: list[Choice]) -> Iterator[Choice]:
        yield from candidates[:20]
        raise KeyboardInterrupt

    stopped = search(config, 4, H100, 2, interrupted)
    assert stopped.stopped
    assert stopped.tried == 20
    assert stopped.fitting


def test_a_written_plan_is_the_configuration_that_was_estimated(found: Search, tmp_path: Path) -> None:
    best = found.ranked()[0]
    save_config(best.config, tmp_path / "plan.yaml")
    read = load_config(tmp_path / "plan.yaml")
    again = estimate(read, 4, H100, 2)
    assert again.stages == best.estimate.stages
    assert again.time == best.estimate.time


def test_rules_refuse_a_choice(config: Config) -> None:
    with pytest.raises(ConfigError, match="num_layers"):
        configure(config, Choice(1, 3, 2, 1, 1, "none", offload=False))


@pytest.mark.parametrize(
    ("layers", "pp", "expected"),
    [(8, 2, (None, None)), (7, 2, (4, 3)), (32, 3, (11, 10)), (32, 6, (4, 4)), (32, 12, (1, 1)), (8, 6, (2, 2))],
)
def test_a_number_of_stages_that_divides_no_layers_gives_the_ends_fewer(
    layers: int, pp: int, expected: tuple[int | None, int | None]
) -> None:
    assert uneven_stages(layers, pp, 1) == expected
    if expected[0]:
        assert (layers - sum(n for n in expected if n)) % max(pp - 2, 1) == 0


def test_three_stages_of_four_layers_are_a_plan(config: Config) -> None:
    found = search(config, 3, H100, 3)
    assert {(plan.choice.pp, plan.choice.vpp) for plan in found.fitting} == {(3, 1)}
    parallel = found.fitting[0].config.parallel
    assert (parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage) == (1, 1)


def test_where_nothing_is_allowed_the_rule_that_the_simplest_layout_breaks_is_kept(config: Config) -> None:
    found = search(config, 7, H100, 8)
    assert not found.fitting
    assert found.least is None
    assert found.refusal.startswith("training.global_batch_size 8 does not divide by micro_batch_size 1 x 7")


@pytest.fixture(scope="module")
def plain(config: Config) -> set[Choice]:
    return {plan.choice for plan in search(config, 2, H100, 2).fitting}


@pytest.mark.parametrize(
    ("recompute", "deepspeed"),
    [
        ({}, {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1000}}),
        ({}, {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}),
        ({}, {"zero_optimization": {"stage": 2, "overlap_comm": True}}),
        ({"strategy": "inverse", "inverse_tolerance": 0.1}, {}),
        ({"strategy": "replay"}, {"activation_checkpointing": {"partition_activations": True}}),
    ],
)
def test_what_only_the_given_stage_or_strategy_knows_does_not_narrow_the_search(
    config: Config, plain: set[Choice], recompute: dict[str, Any], deepspeed: dict[str, Any]
) -> None:
    given = dataclasses.replace(config, recompute=RecomputeConfig(**recompute), deepspeed=deepspeed)
    assert {plan.choice for plan in search(given, 2, H100, 2).fitting} == plain


def test_what_the_search_does_not_decide_stays() -> None:
    offload = {"device": "cpu", "pin_memory": True}
    config = tiny_config(
        parallel={"tensor_model_parallel_size": 2, "sequence_parallel": False},
        deepspeed_section={"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 9, "reduce_bucket_size": 7}},
    )
    assert configure(config, Choice(2, 1, 1, 1, 1, "none", offload=False)).parallel.sequence_parallel is False
    zero = config.deepspeed["zero_optimization"]
    assert configure(config, Choice(2, 1, 1, 3, 1, "none", offload=False)).deepspeed["zero_optimization"] == zero
    narrower = configure(config, Choice(2, 1, 1, 1, 1, "none", offload=False)).deepspeed["zero_optimization"]
    assert narrower == {"stage": 1, "reduce_bucket_size": 7}
    moved = tiny_config(deepspeed_section={"zero_optimization": {"stage": 1, "offload_optimizer": offload}})
    kept = configure(moved, Choice(1, 1, 1, 2, 1, "none", offload=True)).deepspeed["zero_optimization"]
    assert kept["offload_optimizer"] == offload


def test_rebuilding_is_never_free(found: Search) -> None:
    # a tiny model waits for kernels to be started, and products hide behind that
    speeds: dict[Choice, float] = {plan.choice: plan.estimate.tokens_per_second for plan in found.fitting}
    for choice, speed in speeds.items():
        if choice.recompute != "none":
            assert speed < speeds[dataclasses.replace(choice, recompute="none")]
    assert found.ranked()[0].choice.recompute == "none"


def _with(plan: Plan, micro_batch: int, gib: int, **seconds: float) -> Plan:
    """The plan with another time and memory."""
    stage = plan.estimate.stages[0]
    memory = dataclasses.replace(stage.memory, buffers=stage.memory.buffers + gib * 2**30)
    estimated = dataclasses.replace(
        plan.estimate,
        stages=[dataclasses.replace(stage, memory=memory)],
        time=dataclasses.replace(plan.estimate.time, **seconds),
    )
    return Plan(dataclasses.replace(plan.choice, micro_batch=micro_batch), plan.config, estimated)


@pytest.mark.parametrize(
    ("gib", "seconds", "words"),
    [
        (3, {}, "(2) is as fast and needs 3.0 GiB more"),
        (0, {"launches": 1.5}, "(2) reaches 66.7% of its tokens/s, most of it by launches: 0.500 s more per step"),
        (
            0,
            {"launches": 1.05, "bubble": 0.96},
            "(2) reaches 99.5% of its tokens/s: 50 ms more per step by launches, 40 ms less by bubble",
        ),
    ],
)
def test_words_agree_with_the_figures(found: Search, gib: int, seconds: dict[str, float], words: str) -> None:
    plan = next(plan for plan in found.fitting if plan.choice.pp == 1)
    times = dict.fromkeys(dataclasses.asdict(plan.estimate.time), 0.0)
    times.update({"launches": 1.0} | ({"bubble": 1.0} if "bubble" in seconds else {}))
    best, rival = _with(plan, 1, 0, **times), _with(plan, 2, gib, **{**times, **seconds})
    lines = explain(Search(fitting=[best, rival]))
    line = next(line for line in lines if line.startswith("micro_batch"))
    assert line == f"micro_batch 1: the best with another value {words}"
