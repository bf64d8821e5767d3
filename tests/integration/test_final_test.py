"""The test after the last step: its loss, in the metrics and the log."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import Corpus, lines_of, start_here

SPLIT = {"data__train_data_path": "[]", "data__valid_data_path": "[]"}


@pytest.mark.fault("D8")
def test_the_final_weights_are_tested_on_the_test_data(corpus: Corpus, tmp_path: Path) -> None:
    """On the data of the validation, so that both losses of the last step are equal."""
    outcome = start_here(corpus.options(tmp_path / "run", data__test_data_path=f"[{corpus.valid}]"))
    assert outcome.status == 0, outcome.stderr
    test = lines_of(tmp_path / "run", "test_loss")
    assert test == {6: lines_of(tmp_path / "run", "validation_loss")[6]}
    assert set(lines_of(tmp_path / "run", "test_perplexity")) == {6}
    assert f"step 6 | test loss {test[6]:.4f} | test perplexity " in outcome.stdout


@pytest.mark.fault("D8")
def test_the_test_share_of_a_split_is_tested(corpus: Corpus, tmp_path: Path) -> None:
    options = {**SPLIT, "data__data_path": f"[{corpus.valid}]", "data__split": "1,1,1", "training__test_steps": 3}
    outcome = start_here(corpus.options(tmp_path / "run", **options))
    assert outcome.status == 0, outcome.stderr
    assert set(lines_of(tmp_path / "run", "test_loss")) == {6}
    assert lines_of(tmp_path / "run", "test_loss") != lines_of(tmp_path / "run", "validation_loss")


@pytest.mark.fault("D8")
def test_a_test_share_without_a_sample_is_a_note_unless_a_test_was_asked_for(corpus: Corpus, tmp_path: Path) -> None:
    """Three documents: the last thousandth of them is none."""
    options = {**SPLIT, "data__data_path": f"[{corpus.valid}]", "data__split": "500,499,1"}
    outcome = start_here(corpus.options(tmp_path / "run", **options))
    assert outcome.status == 0, outcome.stderr
    assert "note: nothing is tested after the last step: the test split of " in outcome.stdout
    assert lines_of(tmp_path / "run", "test_loss") == {}
    outcome = start_here(corpus.options(tmp_path / "other", **options, training__test_steps=2))
    assert (outcome.status, outcome.stderr.count("\n")) == (2, 1)
    assert "the test split of " in outcome.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.fault("D8")
def test_no_test_is_made_where_none_is_wanted(corpus: Corpus, tmp_path: Path) -> None:
    options = {"data__test_data_path": f"[{corpus.valid}]", "training__test_steps": 0}
    assert start_here(corpus.options(tmp_path / "run", **options)).status == 0
    assert lines_of(tmp_path / "run", "test_loss") == {}
