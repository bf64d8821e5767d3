"""Whole runs whose ranks change, at given steps or by energy: resumed around each change to the bit, exported, and
refused where they are others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_crnet.checkpoint.run_folder import checkpoint_bytes
from megatron_crnet.config.loading import load_config
from megatron_crnet.hf.export import to_hf
from tests.integration.conftest import Corpus, check_continued, checkpoint, lines_of, saved, start, start_here

STEPS, CHANGES, RANKS = 6, [2, 4], [8, 12, 4]
RUN: dict[str, Any] = {
    "model__rank": RANKS[0],
    "rank_schedule__steps": str(CHANGES),
    "rank_schedule__ranks": str(RANKS[1:]),
    "training__train_steps": STEPS,
    "training__eval_steps": 0,
    "training__dtype": "bf16",
    "deepspeed__zero_optimization__stage": 1,
    "checkpoint__save_interval": 1,
}
FACTOR = "model.layers.2.mlp.up_proj.a.weight"
ENERGY, INTERVAL = 0.932, "rank_schedule__check_interval"
BY_ENERGY: dict[str, Any] = {
    **{name: value for name, value in RUN.items() if name != "rank_schedule__steps"},
    "rank_schedule__ranks": "[6, 12]",
    "rank_schedule__energy": ENERGY,
    INTERVAL: 1,
    "optimizer__lr": 1e-2,  # at which the next ranks' share rises by 0.003 in a step
}
CROSSED = [3, 4]


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("ranks") / "run"
    outcome = start_here(corpus.options(output, **RUN))
    assert outcome.status == 0, outcome.stderr
    assert "step 2: ranks change" in outcome.stdout
    return output


@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_a_run_killed_around_a_change_continues_to_the_bit(
    step: int, whole: Path, corpus: Corpus, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    check_continued(whole, cut, step, corpus.options(cut, **RUN))


@pytest.mark.parametrize(("step", "rank"), [(1, 8), (2, 12), (4, 4), (6, 4)])
def test_an_export_has_the_ranks_of_its_step(step: int, rank: int, whole: Path, tmp_path: Path) -> None:
    assert saved(whole, step)[f"exp_avg_sq.{FACTOR}"].shape[0] == rank
    to_hf(checkpoint(whole, step), tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["rank"] == rank
    assert load_file(tmp_path / "export" / "model.safetensors")[FACTOR].shape[0] == rank


def test_the_free_space_that_is_asked_for_is_that_of_the_largest_checkpoint(whole: Path) -> None:
    config = load_config(checkpoint(whole, STEPS) / "config.yaml")
    sizes = {
        step: sum(4 * value.numel() for name, value in saved(whole, step).items() if not name.startswith("random."))
        for step in range(1, STEPS + 1)
    }
    assert checkpoint_bytes(config, 0) == max(sizes.values()) == sizes[3]
    assert checkpoint_bytes(config, CHANGES[-1]) == sizes[STEPS] < sizes[1]


def test_losses_of_other_ranks_make_no_spike(corpus: Corpus, tmp_path: Path) -> None:
    watched = {"faults__spike_deviations": 1e6, "faults__spike_window": 10}
    outcome = start_here(corpus.options(tmp_path / "run", **RUN, **watched))
    assert outcome.status == 0, outcome.stderr
    states = [json.loads((checkpoint(tmp_path / "run", s) / "state.json").read_text()) for s in range(1, STEPS + 1)]
    assert [len(state["recent_losses"]) for state in states] == [1, 0, 1, 0, 1, 2]


@pytest.fixture(scope="module")
def by_energy(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("energy") / "run"
    outcome = start_here(corpus.options(output, **BY_ENERGY))
    assert outcome.status == 0, outcome.stderr
    assert [f"step {step}: ranks change" in outcome.stdout for step in range(1, STEPS + 1)] == [
        step in CROSSED for step in range(1, STEPS + 1)
    ]
    assert "= 768 tokens, at most " in outcome.stdout
    shares = lines_of(output, "rank_energy")
    assert [*shares] == [1, 2, 3, 4], "after the last change nothing is measured"
    assert shares[1] < shares[2] < ENERGY <= shares[3]
    assert 0.5 < shares[4] <= ENERGY
    assert f"step 3: the next ranks keep {shares[3]:.4f} of the energy; ranks shrink at {ENERGY} or more" in (
        outcome.stdout
    )
    assert f"step 4: the leading half of the ranks holds {shares[4]:.4f} of the energy; ranks grow at" in outcome.stdout
    return output


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_killed_around_a_change_by_energy_continues_to_the_bit(
    step: int, by_energy: Path, corpus: Corpus, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    check_continued(by_energy, cut, step, corpus.options(cut, **BY_ENERGY))
    assert lines_of(cut, "rank_energy") == {
        at: share for at, share in lines_of(by_energy, "rank_energy").items() if at > step
    }


def test_a_run_that_is_extended_changes_ranks_at_its_former_end(corpus: Corpus, tmp_path: Path) -> None:
    changes = {**BY_ENERGY, "rank_schedule__ranks": "[6]", INTERVAL: 2}
    changes |= {"optimizer__lr_decay_style": "constant", "checkpoint__save_interval": 0}
    found = {}
    for folder, lengths in (("whole", [6]), ("extended", [4, 6])):
        for steps in lengths:
            outcome = start_here(corpus.options(tmp_path / folder, **{**changes, "training__train_steps": steps}))
            assert outcome.status == 0, outcome.stderr
            assert ("step 4: ranks change" in outcome.stdout) == (steps == 6)
        found[folder] = lines_of(tmp_path / folder, "loss")
    assert found["extended"] == found["whole"]


def test_changes_by_energy_are_those_of_a_schedule_of_their_steps(
    by_energy: Path, corpus: Corpus, tmp_path: Path
) -> None:
    given = {name: value for name, value in BY_ENERGY.items() if name not in ("rank_schedule__energy", INTERVAL)}
    cut = tmp_path / "cut"
    check_continued(by_energy, cut, 2, corpus.options(cut, **given, rank_schedule__steps=str(CROSSED)))


@pytest.mark.long
def test_another_layout_goes_on_between_changes_by_energy(by_energy: Path, corpus: Corpus, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(checkpoint(by_energy, 3), checkpoint(cut, 3))
    layout = {"parallel__tensor_model_parallel_size": 2, "deepspeed__zero_optimization__stage": 3}
    outcome = start(corpus.options(cut, **{**BY_ENERGY, **layout}), ranks=2)
    assert outcome.returncode == 0, outcome.stderr
    assert "step 4: ranks change" in outcome.stdout
    for name in ("rank_energy", "loss"):
        wanted = {step: value for step, value in lines_of(by_energy, name).items() if step > 3}
        assert lines_of(cut, name) == pytest.approx(wanted, rel=1e-2), name


@pytest.mark.parametrize(("step", "rank", "changes"), [(2, 8, []), (3, 6, [3]), (6, 12, [3, 4])])
def test_an_export_has_the_ranks_that_energy_has_led_to(
    step: int, rank: int, changes: list[int], by_energy: Path, tmp_path: Path
) -> None:
    assert json.loads((checkpoint(by_energy, step) / "state.json").read_text())["rank_changes"] == changes
    assert saved(by_energy, step)[f"exp_avg_sq.{FACTOR}"].shape[0] == rank
    to_hf(checkpoint(by_energy, step), tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["rank"] == rank
    assert load_file(tmp_path / "export" / "model.safetensors")[FACTOR].shape[0] == rank


def test_a_checkpoint_between_changes_by_energy_is_evaluated(by_energy: Path, corpus: Corpus, tmp_path: Path) -> None:
    asked = {"training__eval_only": True, "training__eval_steps": 1, "checkpoint__load": checkpoint(by_energy, 3)}
    outcome = start_here(corpus.options(tmp_path / "run", **{**BY_ENERGY, **asked}))
    assert outcome.status == 0, outcome.stderr
    assert "step 3 | validation loss" in outcome.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_schedule__energy": "null", INTERVAL: "null", "rank_schedule__ranks": "[]"}, "rank 12 instead of 8"),
        ({"rank_schedule__ranks": "[6]"}, "changed after the steps [3, 4], but rank_schedule.ranks [6] has 1 entries"),
        ({"rank_schedule__ranks": "[6, 10]"}, "was written with model.rank 12 instead of 10"),
        ({"rank_schedule__ranks": "[6, 12, 4]"}, ""),
    ],
)
def test_after_changes_by_energy_only_later_ones_may_be_added(
    changes: dict[str, Any], message: str, by_energy: Path, corpus: Corpus, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(checkpoint(by_energy, 4), checkpoint(cut, 4))
    outcome = start_here(corpus.options(cut, **{**BY_ENERGY, **changes}))
    assert outcome.status == (2 if message else 0), outcome.stderr
    assert message in outcome.stderr
    if message:
        assert len(outcome.stderr.strip().splitlines()) == 1
    else:
        assert [*lines_of(cut, "rank_energy")] == [5], "a third change is measured for"


def test_the_load_of_experts_is_logged_over_a_change(corpus: Corpus, tmp_path: Path) -> None:
    experts = {"model__architecture": "qwen3_moe", "model__num_experts": 4, "model__moe_router_topk": 2}
    changes = {"rank_schedule__steps": "[2]", "rank_schedule__ranks": "[12]", "training__train_steps": 3}
    outcome = start_here(corpus.options(tmp_path / "run", **experts, **changes, training__eval_steps=0))
    assert outcome.status == 0, outcome.stderr
    for name in ("expert_load_max", "expert_load_min", "load_balancing_loss"):
        assert all(0 < value < 4 for value in lines_of(tmp_path / "run", name).values()), name


def test_a_line_of_a_resumed_run_has_the_load_of_all_its_steps(corpus: Corpus, tmp_path: Path) -> None:
    experts = {"model__architecture": "qwen3_moe", "model__num_experts": 4, "model__moe_router_topk": 2}
    often = {"checkpoint__save_interval": 1, "logging__log_interval": 4, "training__train_steps": 4}
    for cut, step in ((tmp_path / "whole", 0), (tmp_path / "cut", 3)):
        if step:
            shutil.copytree(checkpoint(tmp_path / "whole", step), checkpoint(cut, step))
        outcome = start_here(corpus.options(cut, **experts, **often, training__eval_steps=0))
        assert outcome.status == 0, outcome.stderr
    for name in ("loss", "expert_load_max", "expert_load_min", "load_balancing_loss"):
        assert lines_of(tmp_path / "cut", name)[4] == lines_of(tmp_path / "whole", name)[4], name


def test_operations_of_a_line_are_those_of_its_own_steps(whole: Path) -> None:
    speeds, operations = lines_of(whole, "tokens_per_s"), lines_of(whole, "tflops_per_device")
    each = {step: round(operations[step] * 1e12 / speeds[step]) for step in speeds}
    assert each[1] == each[2] < each[3] == each[4] > each[5] == each[6]


def test_a_later_change_may_be_added_and_an_earlier_one_not_moved(whole: Path, corpus: Corpus, tmp_path: Path) -> None:
    for step in (1, 2):
        shutil.copytree(checkpoint(whole, step), checkpoint(tmp_path / "cut", step))
    moved = {**RUN, "rank_schedule__steps": "[3, 4]"}
    outcome = start_here(corpus.options(tmp_path / "cut", **moved))
    assert outcome.status == 2
    assert "was written with model.rank 12 instead of 8" in outcome.stderr
    longer = {**RUN, "rank_schedule__steps": "[2, 4, 6]", "rank_schedule__ranks": "[12, 4, 6]"}
    outcome = start_here(corpus.options(tmp_path / "cut", **{**longer, "training__train_steps": 7}))
    assert outcome.status == 0, outcome.stderr
    assert saved(tmp_path / "cut", 7)[f"master.{FACTOR}"].shape[0] == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_schedule__steps": "[2]"}, "has 1 entries and rank_schedule.ranks 2"),
        ({"rank_schedule__steps": "[4, 2]"}, "must ascend and end below training.train_steps 6"),
        ({"rank_schedule__steps": "[2, 6]"}, "must ascend and end below training.train_steps 6"),
        ({"model__variant": "full_rank"}, "variant full_rank has no factors"),
        ({"model__variant": "relora"}, "variant relora has restarts of its own"),
        ({"model__variant": "cola"}, "shrink at step 4, but between the factors of cola stands silu"),
        ({"rank_schedule__ranks": "[12, [1, 2]]"}, "rank_schedule.ranks has an entry that cannot be model.rank: "),
        ({"rank_schedule__energy": 0.9, INTERVAL: 2}, "steps [2, 4] and rank_schedule.energy 0.9 are both set"),
    ],
)
def test_a_schedule_that_cannot_be_is_one_line(
    changes: dict[str, Any], message: str, corpus: Corpus, tmp_path: Path
) -> None:
    outcome = start_here(corpus.options(tmp_path / "run", **{**RUN, **changes}))
    assert outcome.status == 2
    assert message in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
