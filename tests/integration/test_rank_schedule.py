"""A whole run whose ranks change: resumed around each change to the bit, exported, and refused where it is another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_crnet.hf.export import to_hf
from tests.integration.conftest import Corpus, check_continued, checkpoint, lines_of, saved, start_here

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


def test_the_load_of_experts_is_logged_over_a_change(corpus: Corpus, tmp_path: Path) -> None:
    experts = {"model__architecture": "qwen3_moe", "model__num_experts": 4, "model__moe_router_topk": 2}
    changes = {"rank_schedule__steps": "[2]", "rank_schedule__ranks": "[12]", "training__train_steps": 3}
    outcome = start_here(corpus.options(tmp_path / "run", **experts, **changes, training__eval_steps=0))
    assert outcome.status == 0, outcome.stderr
    for name in ("expert_load_max", "expert_load_min", "load_balancing_loss"):
        assert all(0 < value < 4 for value in lines_of(tmp_path / "run", name).values()), name


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
