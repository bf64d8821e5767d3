"""The entry point as a user starts it."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_crnet.checkpoint.directory import MANIFEST, complete, file_entries
from tests.integration.conftest import LIMIT_S, ROOT, Corpus, lines_of, start, start_alone, start_here
from tests.integration.processes import start_agent

LOGGED = {
    "step",
    "tokens",
    "loss",
    "grad_norm",
    "lr",
    "step_time_s",
    "tokens_per_s",
    "tflops_per_device",
    "tflops_per_device_whole_attention",
    "peak_memory_bytes",
}


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One whole run with a checkpoint in the middle: its folder and what it printed."""
    output = tmp_path_factory.mktemp("finished") / "run"
    more = {"data__num_workers": 2, "logging__sample_prompt": "def ", "logging__sample_tokens": 5}
    result = start_alone(corpus.options(output, checkpoint__save_interval=3, **more))
    assert result.returncode == 0, result.stderr
    return output, result.stdout


def test_a_run_leaves_everything_that_the_readme_names(finished: tuple[Path, str]) -> None:
    output, printed = finished
    assert {"metrics.jsonl", "config.yaml", "run.json", "tensorboard", "loss.png", "checkpoints"} <= {
        p.name for p in output.iterdir()
    }
    assert (output / "checkpoints" / "latest").read_text() == "step_00000006\n"
    assert not list((output / "checkpoints").glob(".*"))
    assert "unigram entropy of the validation tokens" in printed
    assert "--- a sampled continuation ---\ndef " in printed


def test_metric_lines_have_the_documented_keys(finished: tuple[Path, str]) -> None:
    output, _ = finished
    assert all(set(lines_of(output, key)) >= set(range(1, 7)) for key in LOGGED - {"step"})
    assert set(lines_of(output, "validation_loss")) == set(lines_of(output, "validation_perplexity")) == {3, 6}
    assert list(lines_of(output, "tokens").values())[-1] == 6 * 4 * 32
    losses = lines_of(output, "loss")
    assert losses[6] < losses[1]


def test_a_second_call_has_nothing_to_do(finished: tuple[Path, str], corpus: Corpus) -> None:
    output, _ = finished
    before = (output / "metrics.jsonl").read_text()
    result = start(["--config", str(output / "config.yaml")])
    assert result.returncode == 0
    assert "nothing to do" in result.stdout
    assert (output / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(("dtype", "stage"), [("fp32", 0), ("bf16", 3)])
def test_a_resumed_run_repeats_the_losses_of_the_whole_one(
    finished: tuple[Path, str], corpus: Corpus, tmp_path: Path, dtype: str, stage: int
) -> None:
    whole, cut = finished[0], tmp_path / "cut"
    changes = {"checkpoint__save_interval": 3, "training__dtype": dtype, "deepspeed__zero_optimization__stage": stage}
    if stage:
        whole = tmp_path / "whole"
        assert start(corpus.options(whole, **changes)).returncode == 0
    (cut / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "step_00000003", cut / "checkpoints" / "step_00000003")
    result = start(corpus.options(cut, **changes))
    assert result.returncode == 0, result.stderr
    assert "continuing from" in result.stdout
    resumed, uninterrupted = lines_of(cut, "loss"), lines_of(whole, "loss")
    assert resumed == {step: uninterrupted[step] for step in (4, 5, 6)}


def test_another_model_does_not_continue_a_checkpoint(finished: tuple[Path, str], corpus: Corpus) -> None:
    rows = (
        ({"model__hidden_size": 64}, "written with model.hidden_size 32 instead of 64"),
        ({"model__variant": "cola"}, "written with model.variant crnet instead of cola"),
    )
    for changes, message in rows:
        error, status = refusal(corpus.options(finished[0], training__train_steps=9, **changes))
        assert (status, message in error) == (2, True), error


def test_a_validation_that_is_due_is_not_done_where_there_is_none(
    finished: tuple[Path, str], corpus: Corpus, tmp_path: Path
) -> None:
    """The checkpoint of a run that was stopped in its validation, continued without validation data."""
    cut = tmp_path / "cut"
    checkpoint = cut / "checkpoints" / "step_00000003"
    shutil.copytree(finished[0] / "checkpoints" / checkpoint.name, checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "validation_due": True}))
    names = [path.name for path in checkpoint.iterdir() if path.name != MANIFEST]
    checkpoint.rename(cut / "partial")
    complete(cut / "partial", checkpoint, file_entries(cut / "partial", names))
    result = start(corpus.options(cut, training__eval_interval=0, training__eval_steps=0))
    assert result.returncode == 0, result.stderr
    assert lines_of(cut, "validation_loss") == {}
    assert lines_of(cut, "loss") == {step: loss for step, loss in lines_of(finished[0], "loss").items() if step > 3}


def test_two_ranks_follow_one(finished: tuple[Path, str], corpus: Corpus, tmp_path: Path) -> None:
    alone, _ = finished
    output = tmp_path / "two"
    agent = start_agent(corpus.options(output, deepspeed__zero_optimization__stage=2))
    printed, _ = agent.communicate(timeout=LIMIT_S)
    assert agent.returncode == 0, printed
    for key in ("loss", "grad_norm", "validation_loss"):
        assert lines_of(output, key) == pytest.approx(lines_of(alone, key), rel=1e-5)


def test_recomputation_changes_no_digit(finished: tuple[Path, str], corpus: Corpus, tmp_path: Path) -> None:
    alone, _ = finished
    result = start(corpus.options(tmp_path / "replay", recompute__strategy="replay"))
    assert result.returncode == 0, result.stderr
    for key in ("loss", "grad_norm", "validation_loss"):
        assert lines_of(tmp_path / "replay", key) == lines_of(alone, key)
    result = start(corpus.options(tmp_path / "inverse", recompute__strategy="inverse"))
    assert result.returncode == 0, result.stderr
    assert lines_of(tmp_path / "inverse", "loss") == pytest.approx(lines_of(alone, "loss"), rel=1e-5)
    assert set(lines_of(tmp_path / "inverse", "num_extra_checkpoints").values()) == {0}


def test_two_by_two_model_parallel_ranks_follow_one(finished: tuple[Path, str], corpus: Corpus, tmp_path: Path) -> None:
    alone, _ = finished
    output = tmp_path / "four"
    layout = {"parallel__tensor_model_parallel_size": 2, "parallel__pipeline_model_parallel_size": 2}
    prompt = {"logging__sample_prompt": "def ", "logging__sample_tokens": 4}
    result = start(corpus.options(output, **layout, **prompt), ranks=4)
    assert result.returncode == 0, result.stderr
    assert "--- a sampled continuation ---\ndef " in result.stdout
    for key in ("loss", "grad_norm", "validation_loss", "lr"):
        assert lines_of(output, key) == pytest.approx(lines_of(alone, key), rel=1e-5)


def test_padded_rows_train_on_text_alone_whatever_the_ranks(corpus: Corpus, tmp_path: Path) -> None:
    changes = {"data__sample_format": "padded", "training__seq_length": 2048, "training__train_steps": 2}
    runs = [tmp_path / "one", tmp_path / "two"]
    for ranks, output in enumerate(runs, start=1):
        result = start(corpus.options(output, **changes), ranks=ranks)
        assert result.returncode == 0, result.stderr
    assert 0 < lines_of(runs[0], "tokens")[2] < 2 * 4 * 2048
    assert lines_of(runs[0], "tokens") == lines_of(runs[1], "tokens")
    assert lines_of(runs[1], "loss") == pytest.approx(lines_of(runs[0], "loss"), rel=1e-5)
    assert lines_of(runs[1], "grad_norm") == pytest.approx(lines_of(runs[0], "grad_norm"), rel=1e-5)


MISTAKES = {
    "unknown key": ({"model__rnak": 3}, "did you mean rank?"),
    "sizes": ({"model__hidden_size": 33}, "model.hidden_size 33"),
    "no data": ({"data__train_data_path": "[absent/train]"}, "absent/train"),
    "vocabulary": ({"model__vocab_size": 500}, "vocab_size"),
    "batch": ({"training__global_batch_size": 5}, "training.global_batch_size 5"),
    "tokenizer": ({"data__tokenizer_model": "absent.model"}, "absent.model"),
    "deepspeed section": ({"deepspeed__zero_optimisation__stage": 2}, "did you mean zero_optimization?"),
    "deepspeed key": (
        {"deepspeed__zero_optimization__stag": 2},
        "unknown key deepspeed.zero_optimization.stag: did you mean stage?",
    ),
    "deepspeed yaml": ({"deepspeed__aio__x": "[1"}, "is not valid YAML"),
    "wandb": ({"logging__wandb_project": "mine"}, "pip install wandb"),
}


def refusal(options: list[str]) -> tuple[str, int]:
    """The one line that a command line gives, and its status."""
    outcome = start_here(options)
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error")]
    return line, outcome.status


@pytest.fixture(scope="module")
def refusals(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int, Path]]:
    """What each mistake printed, the status it gave, and the folder that it must not have made."""
    folder = tmp_path_factory.mktemp("mistakes")
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus.train}{suffix}", folder / f"cut{suffix}")
    os.truncate(folder / "cut.bin", 1000)
    MISTAKES["truncated"] = ({"data__train_data_path": f"[{folder / 'cut'}]"}, "cut.bin")
    return {
        name: (*refusal(corpus.options(folder / name, **changes)), folder / name)
        for name, (changes, _) in MISTAKES.items()
    }


@pytest.mark.parametrize("name", [*MISTAKES, "truncated"])
def test_a_mistake_is_one_line_status_2_and_nothing_written(
    name: str, refusals: dict[str, tuple[str, int, Path]]
) -> None:
    error, status, folder = refusals[name]
    assert status == 2
    assert error.startswith("error: ")
    assert MISTAKES[name][1] in error
    assert not folder.exists()


def test_the_exit_status_of_a_mistake_reaches_the_shell(corpus: Corpus, tmp_path: Path) -> None:
    result = start_alone(corpus.options(tmp_path / "run", model__rnak=3))
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_the_next_start_is_from_a_good_state(
    corpus: Corpus, tmp_path: Path
) -> None:
    """Two good steps; then a rate whose first update ruins the weights, which the step after that one finds."""
    output, saving = tmp_path / "run", {"checkpoint__save_interval": 1}
    assert start(corpus.options(output, training__train_steps=2, **saving)).returncode == 0
    ruin = {"optimizer__lr": 1000, "optimizer__clip_grad": 0, "optimizer__lr_decay_style": "constant"}
    result = start(corpus.options(output, training__train_steps=8, **ruin, **saving))
    assert result.returncode == 3, result.stderr
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert "at step 4 (learning rate 1.000e+03, last gradient norm " in error
    assert error.endswith(
        "checkpoints/step_00000002; the state just before this step is kept beside it as "
        "rejected_step_00000003.from_step_00000004"
    )
    assert (output / "checkpoints" / "latest").read_text() == "step_00000002\n"
    result = start(corpus.options(output, training__train_steps=5, **saving))
    assert result.returncode == 0, result.stderr
    assert "training.train_steps differs from the checkpoint's" in result.stdout
    assert set(lines_of(output, "loss")) == {1, 2, 3, 4, 5}
    assert (output / "checkpoints" / "latest").read_text() == "step_00000005\n"
    assert not list((output / "checkpoints").glob(".*"))


def test_dry_run_prints_and_writes_nothing(corpus: Corpus, tmp_path: Path) -> None:
    result = start([*corpus.options(tmp_path / "run"), "--dry-run"])
    assert result.returncode == 0
    resolved = yaml.safe_load(result.stdout.partition("parameters (crnet, llama)")[0])
    assert resolved["training"]["train_steps"] == 6
    for part in (
        "embedding",
        "low-rank maps",
        "micro-batches",
        "memory of a rank, GiB",
        "operations of a step",
        "volume of a rank",
    ):
        assert part in result.stdout
    assert not (tmp_path / "run").exists()


def test_a_terminal_gets_a_bar_and_a_file_plain_lines(corpus: Corpus, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    command = [sys.executable, "pretrain_crnet.py", *corpus.options(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=follower)
    os.close(follower)
    shown = "".join(_read_all(leader))
    assert process.wait(timeout=LIMIT_S) == 0
    assert "6/6" in shown
    assert "step/s" in shown or "s/step" in shown
    assert process.stdout is not None
    assert b"step 6/6 | loss" in process.stdout.read()


def _read_all(terminal: int) -> Iterator[str]:
    """What a process writes to its terminal until it ends."""
    while True:
        try:
            yield os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # Linux ends a terminal's output with EIO
            return
