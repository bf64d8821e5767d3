"""A resumed run is the same run, or says in one line what is not the same; by the entry point, in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_crnet.checkpoint_folder import MANIFEST, complete, file_entries
from megatron_crnet.fingerprint import sidecar
from megatron_crnet.tokenizer_training import train_sentencepiece
from tests.integration.conftest import Corpus, lines_of, start_here
from tests.unit.data_helpers import library_texts

QUIET: dict[str, Any] = {"training__eval_steps": 0, "checkpoint__save_interval": 3}


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps without validation, with a checkpoint of step 3."""
    output = tmp_path_factory.mktemp("whole") / "run"
    outcome = start_here(corpus.options(output, **QUIET))
    assert outcome.status == 0, outcome.stderr
    return output


@pytest.fixture
def cut(whole: Path, tmp_path: Path) -> Path:
    """The folder of that run as it was after step 3."""
    output = tmp_path / "run"
    shutil.copytree(whole / "checkpoints" / "step_00000003", output / "checkpoints" / "step_00000003")
    return output


def rewrite_state(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change state.json of step 3, and its checksum with it."""
    checkpoint = output / "checkpoints" / "step_00000003"
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    names = [path.name for path in checkpoint.iterdir() if path.name != MANIFEST]
    checkpoint.rename(output / "partial")
    complete(output / "partial", checkpoint, file_entries(output / "partial", names))


def remarks(stdout: str) -> list[str]:
    return [line for line in stdout.splitlines() if line.startswith(("warning:", "note:"))]


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same size as the corpus's."""
    return train_sentencepiece(library_texts(20), tmp_path_factory.mktemp("other") / "tokenizer", 512)


@pytest.fixture(scope="module")
def unnamed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as an earlier version left it: nothing beside it."""
    folder = tmp_path_factory.mktemp("unnamed")
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus.train}{suffix}", folder / f"train{suffix}")
    return folder / "train"


@pytest.mark.fault("B4", "L5")
def test_an_unchanged_run_goes_on_without_a_remark(cut: Path, whole: Path, corpus: Corpus) -> None:
    outcome = start_here(corpus.options(cut, **QUIET))
    assert outcome.status == 0, outcome.stderr
    assert remarks(outcome.stdout) == []
    assert lines_of(cut, "loss") == {step: loss for step, loss in lines_of(whole, "loss").items() if step > 3}


@pytest.mark.fault("L6")
def test_a_new_run_refuses_data_of_another_tokenizer(corpus: Corpus, other_tokenizer: Path, tmp_path: Path) -> None:
    outcome = start_here(corpus.options(tmp_path / "run", data__tokenizer_model=other_tokenizer, **QUIET))
    assert (outcome.status, outcome.stderr.count("\n")) == (2, 1)
    assert f"error: {corpus.train}.bin was made with the tokenizer" in outcome.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("B4", "L5")
def test_another_tokenizer_does_not_continue_a_run(
    cut: Path, corpus: Corpus, unnamed: Path, other_tokenizer: Path
) -> None:
    """The tokenizer was trained again under the same size; the data do not say which one made them."""
    before = sorted(cut.rglob("*"))
    outcome = start_here(
        corpus.options(cut, data__tokenizer_model=other_tokenizer, data__train_data_path=f"[{unnamed}]", **QUIET)
    )
    assert (outcome.status, outcome.stderr.count("\n")) == (2, 1)
    assert "step_00000003 was trained with the tokenizer" in outcome.stderr
    assert sorted(cut.rglob("*")) == before


@pytest.mark.fault("L6")
def test_data_that_do_not_name_their_tokenizer_are_taken_with_a_remark(
    cut: Path, whole: Path, corpus: Corpus, unnamed: Path
) -> None:
    outcome = start_here(corpus.options(cut, data__train_data_path=f"[{unnamed}]", **QUIET))
    assert outcome.status == 0, outcome.stderr
    (remark,) = remarks(outcome.stdout)
    assert remark.startswith(f"note: {unnamed}.bin does not say which tokenizer made it")
    assert lines_of(cut, "loss") == {step: loss for step, loss in lines_of(whole, "loss").items() if step > 3}


@pytest.mark.fault("B4", "L5")
@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"data__train_data_path": "[{valid}]"}, "warning: the train data are not those of the checkpoint"),
        ({"data__train_data_path": "[{train}, {valid}]"}, "warning: the train data are not those of the checkpoint"),
        ({"data__sample_format": "padded"}, "warning: data.sample_format differs from the checkpoint's (padded"),
        ({"training__seed": 7}, "warning: training.seed differs from the checkpoint's (7 instead of 1234)"),
        ({"training__seq_length": 16}, "warning: training.seq_length differs from the checkpoint's (16 instead of 32)"),
    ],
)
def test_what_is_not_as_before_is_one_warning(
    cut: Path, corpus: Corpus, changes: dict[str, str], beginning: str
) -> None:
    paths = {"train": corpus.train, "valid": corpus.valid}
    filled = {key: value.format(**paths) if isinstance(value, str) else value for key, value in changes.items()}
    outcome = start_here(corpus.options(cut, **{**QUIET, **filled}))
    assert outcome.status == 0, outcome.stderr
    (remark,) = remarks(outcome.stdout)
    assert remark.startswith(beginning)
    assert set(lines_of(cut, "loss")) == {4, 5, 6}


@pytest.mark.fault("B4")
def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_remark(cut: Path, whole: Path, corpus: Corpus) -> None:
    rewrite_state(cut, lambda state: state.pop("trained_on"))
    outcome = start_here(corpus.options(cut, **QUIET))
    assert outcome.status == 0, outcome.stderr
    (remark,) = remarks(outcome.stdout)
    assert remark.startswith("note: checkpoint ")
    assert "does not say what it was trained on" in remark
    assert lines_of(cut, "loss") == {step: loss for step, loss in lines_of(whole, "loss").items() if step > 3}


@pytest.mark.fault("B4", "L6")
def test_state_and_data_name_the_same_tokenizer(whole: Path, corpus: Corpus) -> None:
    state = json.loads((whole / "checkpoints" / "step_00000006" / "state.json").read_text())
    assert state["trained_on"]["tokenizer"] == json.loads(sidecar(corpus.train).read_text())["tokenizer"]["sha256"]
    assert set(state["trained_on"]["data"]) == {"train", "valid"}
