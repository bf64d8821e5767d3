"""The search: what it tries, drops, ranks and says, how it stops, and that its file is a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_crnet.config import Config
from megatron_crnet.errors import ConfigError
from megatron_crnet.estimate import estimate
from megatron_crnet.machines import MACHINES, Machine
from megatron_crnet.plan_search import RESERVE, Choice, Search, choices, configure, explain, peak, search
from megatron_crnet.settings import load_config, save_config
from tests.helpers import tiny_config

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


def test_the_fastest_is_first_and_everything_fits(found: Search) -> None:
    speeds = [plan.estimate.tokens_per_second for plan in found.ranked()]
    assert speeds == sorted(speeds, reverse=True)
    assert all(peak(plan) <= (1 - RESERVE) * H100.memory_bytes for plan in found.fitting)


def test_what_does_not_fit_is_dropped(config: Config, found: Search) -> None:
    sizes = sorted(peak(plan) for plan in found.fitting)
    small: Machine = dataclasses.replace(H100, memory_bytes=sizes[len(sizes) // 2] / (1 - RESERVE) + 1)
    less = search(config, 4, small, 2)
    assert 0 < len(less.fitting) < len(found.fitting)
    assert less.too_large == len(found.fitting) - len(less.fitting)
    none = search(config, 4, dataclasses.replace(H100, memory_bytes=1), 2)
    assert not none.fitting
    assert none.least is not None
    assert peak(none.least) == sizes[0]


def test_the_first_choice_is_explained_in_every_dimension(found: Search) -> None:
    lines = explain(found)
    for line, name in zip(lines, (field.name for field in dataclasses.fields(Choice)), strict=True):
        assert line.startswith(f"{name} {getattr(found.ranked()[0].choice, name)}: ")
        assert "of its tokens/s" in line or "no plan with another value" in line


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
        configure(config, Choice(1, 3, 1, 1, 1, "none", offload=False))
