"""Runs to which bad things happen: losses that are no numbers, spikes, full disks, ranks that are killed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import Corpus, lines_of, start, start_here
from tests.integration.kills import Kills

SKIP = {"faults__on_bad_step": "skip", "checkpoint__save_interval": 1}
# at a rate that changes next to nothing, losses differ by their data alone: every second one is above the mean
SPIKES = {"faults__spike_deviations": 1e-9, "faults__spike_window": 2, "optimizer__lr": 1e-8}


def test_spikes_are_skipped_and_counted_up_to_the_limit(corpus: Corpus, tmp_path: Path) -> None:
    """What is above the mean of the last losses is skipped, also by a run that was continued."""
    output = tmp_path / "run"
    options = {**SKIP, **SPIKES, "training__train_steps": 30}
    result = start(corpus.options(output, **options, faults__max_skips=30, faults__max_skips_in_a_row=30), ranks=2)
    assert result.returncode == 0, result.stderr
    skipped = lines_of(output, "skipped_steps")
    count = int(skipped[max(skipped)])
    assert 0 < count < 28
    assert result.stdout.count("is skipped: the loss is") == count
    assert len(lines_of(output, "loss")) == 30 - count
    state = json.loads((output / "checkpoints" / "step_00000030" / "state.json").read_text())
    assert (state["skipped"], state["samples"], state["adam_steps"]) == (count, 120, 30 - count)
    assert state["tokens"] == (30 - count) * 4 * 32

    again = tmp_path / "again"
    first = sorted(set(range(1, 31)) - set(lines_of(output, "loss")))[0]
    limited = {**options, "faults__max_skips": 0}
    result = start(corpus.options(again, **limited))
    assert result.returncode == 3, result.stderr
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert f"step {first} would be skipped step 1 of at most faults.max_skips 0 at step {first} (learning rate" in error
    assert f"is kept beside it as rejected_step_{first - 1:08d}" in error
    assert (again / "checkpoints" / "latest").read_text() == f"step_{first - 2:08d}\n"
    result = start(corpus.options(again, **options, faults__max_skips=30, faults__max_skips_in_a_row=30))
    assert result.returncode == 0, result.stderr
    assert lines_of(again, "loss") == pytest.approx(lines_of(output, "loss"), rel=1e-4)
    assert lines_of(again, "skipped_steps") == skipped


def test_a_skipped_step_leaves_no_count_of_its_tokens(corpus: Corpus, tmp_path: Path) -> None:
    """Between two metric lines a checkpoint holds what routers have counted, which may be of losses that are NaN."""
    experts = {"model__architecture": "qwen3_moe", "model__num_experts": 4, "model__moe_router_topk": 2}
    skip = {**SKIP, **SPIKES, "faults__max_skips": 30, "faults__max_skips_in_a_row": 30}
    options = {**experts, **skip, "training__train_steps": 12, "training__eval_steps": 0, "logging__log_interval": 100}
    outcome = start_here(corpus.options(tmp_path / "run", **options))
    assert outcome.status == 0, outcome.stderr
    states = [
        json.loads((tmp_path / "run" / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
        for step in range(1, 12)
    ]
    assert 0 < states[-1]["skipped"] < 11
    for state in states:  # the first step has a metric line
        assert all(sum(layer[:-1]) == 2 * (state["tokens"] - 4 * 32) for layer in state["unlogged_routing"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that is soon full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], check=False).returncode == 0
    )
    if not mounted:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_and_harms_neither_the_run_nor_its_checkpoints(
    corpus: Corpus, tmp_path: Path, small_disk: Path
) -> None:
    """Room for the first checkpoints only; the run itself goes on, and its last save fails loudly."""
    options = corpus.options(
        small_disk / "run", data__cache_path=tmp_path / "cache", training__train_steps=40, checkpoint__save_interval=2
    )
    result = start(options, ranks=2)
    assert result.returncode == 1, result.stdout
    assert "warning: " in result.stdout
    assert "training goes on" in result.stdout
    assert "step 40/40 | loss" in result.stdout
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert errors
    assert all("free some space" in error and error.endswith("earlier checkpoints are untouched") for error in errors)
    whole = sorted(path.name for path in (small_disk / "run" / "checkpoints").glob("step_*"))
    assert whole
    os.truncate(small_disk / "run" / "metrics.jsonl", 0)
    for name in whole[:-1]:
        subprocess.run(["rm", "-r", str(small_disk / "run" / "checkpoints" / name)], check=True)
    result = start([*options, "--checkpoint.keep_last=1"], ranks=2)
    assert result.returncode == 0, result.stderr
    assert f"checkpoints/{whole[-1]}, step" in result.stdout
    assert "skipped" not in result.stdout


def test_a_folder_that_cannot_be_written_is_one_line_on_every_rank(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = start(corpus.options(tmp_path / "file" / "run", data__cache_path=tmp_path / "cache"), ranks=2)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert any("cannot be written" in error and "logging.output_dir" in error for error in errors), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.long
def test_a_run_that_is_killed_at_random_ends_like_one_that_is_not(corpus: Corpus, tmp_path: Path) -> None:
    found = Kills(corpus, tmp_path, seed=1, kills=2, steps=20).run()
    assert len(found.kills) == 2
    assert found.differences() == []


@pytest.mark.faults
def test_a_hundred_kills(corpus: Corpus, tmp_path: Path) -> None:
    seed, kills = int(os.environ.get("FAULTS_SEED", "2")), int(os.environ.get("FAULTS_KILLS", "100"))
    found = Kills(corpus, tmp_path, seed=seed, kills=kills).run()
    print(json.dumps(found.figures(), indent=1))
    assert len(found.kills) == kills
    assert {"start-up", "step", "save"} == {kill.moment for kill in found.kills}
    assert found.differences() == []
