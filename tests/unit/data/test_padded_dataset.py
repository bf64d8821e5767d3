"""Padded rows: one document each, masked beyond its end, in a new order each epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_crnet.utils.errors import DataError
from tests.unit.data_helpers import (
    SEQ,
    VOCAB,
    PlainTokenizer,
    build,
    whole,
    write_indexed,
)


def expected_row(document: list[int], pad: int) -> tuple[list[int], list[int], list[float]]:
    text = document[: SEQ + 1]
    filled = text + [pad] * (SEQ + 1 - len(text))
    return filled[:-1], filled[1:], [1.0] * (len(text) - 1) + [0.0] * (SEQ + 1 - len(text))


@pytest.mark.parametrize("pad", [0, 1])
def test_padded_rows(prefix: str, documents: list[list[int]], pad: int) -> None:
    tokenizer = PlainTokenizer(VOCAB, eod=1, pad=pad)
    train = build(200, data_path=[prefix], split="1,0,0", sample_format="padded", tokenizer=tokenizer).train
    rows = [
        (r["tokens"].tolist(), r["labels"].tolist(), r["loss_mask"].tolist())
        for r in map(train.__getitem__, range(200))
    ]
    assert sorted(rows) == sorted(expected_row(document, pad) for document in documents)
    assert {sum(mask) < SEQ for _, _, mask in rows} == {True, False}, "the data must try both cut and padded rows"


def test_padded_epochs_are_shuffled_anew_and_reproducibly(prefix: str) -> None:
    options: dict[str, Any] = {"data_path": [prefix], "split": "1,0,0", "sample_format": "padded"}
    train = build(450, **options).train
    assert len(train) == 600
    rows = [tuple(whole(train[i])) for i in range(600)]
    epochs = [rows[i : i + 200] for i in (0, 200, 400)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = build(450, **options).train
    assert [tuple(whole(again[i])) for i in (500, 3, 250)] == [rows[i] for i in (500, 3, 250)]
    other = build(450, seed=5, **options).train
    assert [tuple(whole(other[i])) for i in range(200)] != epochs[0]
    with pytest.raises(IndexError):
        train[600]


@pytest.mark.fault("L4")
def test_documents_without_a_label_are_passed_over(tmp_path: Path) -> None:
    """Megatron's own tool writes no end of document, so that a text of one token is one token."""
    documents = [[5], [6, 7], [], [8], [9, 10, 11]]
    prefix = write_indexed(tmp_path / "short", documents)
    train = build(5, train_data_path=[prefix], sample_format="padded").train
    assert len(train) == 6, "three epochs of two documents"
    assert all(train[i]["loss_mask"].sum() > 0 for i in range(6))
    assert sorted(whole(train[i])[:2] for i in range(2)) == [[6, 7], [9, 10]]


@pytest.mark.fault("L4")
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_split_without_a_label_is_refused_before_training(tmp_path: Path, split: str) -> None:
    empty = write_indexed(tmp_path / "empty", [[5], [6], [7]])
    good = write_indexed(tmp_path / "good", [[5, 6, 7]])
    paths = {f"{name}_data_path": [empty if name == split else good] for name in ("train", "valid", "test")}
    with pytest.raises(DataError, match=f"no document in the {split} split of {empty} has two tokens"):
        build(1, 1, 1, sample_format="padded", **paths)
