"""Datasets: samples, splits, blends, epochs, caches, and several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_crnet.data.datasets import Datasets
from megatron_crnet.data.indexed import read_index
from tests.unit.data_helpers import (
    SEQ,
    VOCAB,
    build,
    whole,
    write_even_and_odd,
    write_indexed,
)


def windows(documents: list[list[int]]) -> set[tuple[int, ...]]:
    """All runs of s + 1 ids inside documents; seeds make them unlike between corpora."""
    return {tuple(d[i : i + SEQ + 1]) for d in documents for i in range(len(d) - SEQ)}


@pytest.mark.parametrize("sample_format", ["packed", "padded"])
def test_sample_layout(prefix: str, sample_format: str) -> None:
    train = build(50, data_path=[prefix], split="1,0,0", sample_format=sample_format).train
    for sample in (train[0], train[len(train) - 1]):
        for key in ("tokens", "labels", "position_ids"):
            assert (sample[key].dtype, sample[key].shape) == (torch.int64, (SEQ,))
        assert (sample["loss_mask"].dtype, sample["loss_mask"].shape) == (torch.float32, (SEQ,))
        assert sample["position_ids"].tolist() == list(range(SEQ))
        assert int(sample["labels"].min()) >= 0
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()


def test_packed_epoch_uses_every_token_once(prefix: str, documents: list[list[int]]) -> None:
    tokens = sum(map(len, documents))
    train = build((tokens - 1) // SEQ, data_path=[prefix], split="1,0,0").train
    assert len(train) == (tokens - 1) // SEQ
    seen = np.bincount(np.concatenate([train[i]["tokens"] for i in range(len(train))]), minlength=VOCAB)
    missing = np.bincount(np.concatenate(documents), minlength=VOCAB) - seen
    assert missing.min() >= 0
    assert missing.sum() == tokens - len(train) * SEQ


@pytest.mark.parametrize("sample_format", ["packed", "padded"])
def test_splits_share_no_document(prefix: str, documents: list[list[int]], sample_format: str) -> None:
    built = build(300, 50, 20, data_path=[prefix], split="80,15,5", sample_format=sample_format)
    bounds = (0, 160, 190, 200)
    for dataset, first, end in zip((built.train, built.valid, built.test), bounds, bounds[1:], strict=False):
        assert dataset.indices.tolist() == list(range(first, end))
        ids = {tuple(documents[d]) for d in range(first, end)}
        inside = [tuple(whole(dataset[i])) for i in range(20)]
        own = windows([list(d) for d in ids])
        foreign = windows(documents) - own
        assert not foreign.intersection(inside)


def test_more_samples_than_an_epoch(prefix: str, documents: list[list[int]]) -> None:
    epoch = sum(map(len, documents)) // SEQ
    built = build(5 * epoch, 1000, data_path=[prefix], split="90,10,0")
    assert len(built.train) >= 5 * epoch
    assert len(built.valid) >= 1000
    assert built.test is None


@pytest.fixture
def two_prefixes(tmp_path: Path) -> list[str]:
    return write_even_and_odd(tmp_path)


def share_of_odd(dataset: Any, count: int) -> float:
    """Share of samples from the second prefix."""
    return sum(int(dataset[i]["tokens"][0]) % 2 for i in range(count)) / count


@pytest.mark.parametrize("sample_format", ["packed", "padded"])
def test_weighted_blend(two_prefixes: list[str], sample_format: str) -> None:
    blend = [0.75, two_prefixes[0], 0.25, two_prefixes[1]]
    built = build(1000, 100, data_path=blend, split="80,20,0", sample_format=sample_format)
    assert len(built.train) >= 1000
    assert share_of_odd(built.train, 1000) == pytest.approx(0.25, abs=0.01)
    assert share_of_odd(built.valid, 100) == pytest.approx(0.25, abs=0.03)
    assert share_of_odd(built.train, 40) == pytest.approx(0.25, abs=0.05), "the parts must be mixed from the start"


@pytest.mark.parametrize("sample_format", ["packed", "padded"])
def test_unweighted_blend_follows_the_sizes_over_several_epochs(two_prefixes: list[str], sample_format: str) -> None:
    sizes = [read_index(prefix) for prefix in two_prefixes]
    amounts = [s.documents if sample_format == "padded" else s.tokens_in((0.0, 1.0)) for s in sizes]
    train = build(3000, data_path=two_prefixes, split="1,0,0", sample_format=sample_format).train
    assert len(train) >= 3000
    assert share_of_odd(train, 3000) == pytest.approx(amounts[1] / sum(amounts), abs=0.01)


@pytest.mark.parametrize("sample_format", ["packed", "padded"])
def test_splits_with_files_of_their_own(two_prefixes: list[str], sample_format: str) -> None:
    built = build(
        100, 50, train_data_path=[two_prefixes[0]], valid_data_path=[two_prefixes[1]], sample_format=sample_format
    )
    assert share_of_odd(built.train, 100) == 0
    assert share_of_odd(built.valid, 50) == 1
    assert len(built.valid.indices) == 200


def test_a_split_without_samples_is_not_built(prefix: str) -> None:
    built = build(10, data_path=[prefix], split="1000,1,0")  # 0 documents for validation: Megatron-Core would hang
    assert built.valid is None
    assert built.test is None
    assert build(0, 0, data_path=[prefix]) == Datasets(None, None, None)


def test_caches_lie_beside_the_data_or_where_asked(prefix: str, tmp_path: Path) -> None:
    build(10, data_path=[prefix], split="1,0,0")
    assert list((tmp_path / "cache").rglob("*-PackedDataset-train-sample_index.npy"))
    build(10, data_path=[prefix], split="1,0,0", cache_path=str(tmp_path / "elsewhere"))
    assert list((tmp_path / "elsewhere").rglob("*-PackedDataset-train-sample_index.npy"))


def test_new_data_under_an_old_name_is_not_read_through_the_old_cache(prefix: str, documents: list[list[int]]) -> None:
    build(10, data_path=[prefix], split="1,0,0")
    write_indexed(Path(prefix), documents[:50])
    train = build(10, data_path=[prefix], split="1,0,0").train
    assert train.document_index.max() < 50
