"""Unigram entropy against numpy, for packed, padded, blended and large data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_crnet.unigram import unigram_entropy
from tests.unit.data_helpers import SEQ, VOCAB, build, random_documents, write_even_and_odd, write_indexed


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    return random_documents(200, VOCAB, seed=1)


@pytest.fixture
def prefix(tmp_path: Path, documents: list[list[int]]) -> str:
    return write_indexed(tmp_path / "data", documents)


def entropy(ids: Any) -> float:
    _, counts = np.unique(np.concatenate(ids), return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def test_unigram_entropy_of_the_validation_documents(prefix: str, documents: list[list[int]]) -> None:
    for sample_format, used in (
        ("packed", documents[140:200]),
        ("padded", [d[1 : SEQ + 1] for d in documents[140:200]]),
    ):
        valid = build(10, 10, data_path=[prefix], split="70,30,0", sample_format=sample_format).valid
        assert unigram_entropy(valid, VOCAB) == pytest.approx(entropy(used), rel=1e-12)
    assert abs(entropy(documents[140:200]) - entropy(documents[:140])) > 1e-3, (
        "the splits must differ to tell them apart"
    )


def test_unigram_entropy_of_a_blend_is_that_of_the_mixture(tmp_path: Path) -> None:
    two_prefixes = write_even_and_odd(tmp_path)
    blend = ["3", two_prefixes[0], "1", two_prefixes[1]]
    valid = build(10, 10, train_data_path=[two_prefixes[0]], valid_data_path=blend).valid
    parts = [build(10, 10, train_data_path=[p], valid_data_path=[p]).valid for p in two_prefixes]
    # the two parts share no id, so the entropy of the mixture is that of the choice plus the mean
    choice = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    expected = choice + 0.75 * unigram_entropy(parts[0], VOCAB) + 0.25 * unigram_entropy(parts[1], VOCAB)
    assert unigram_entropy(valid, VOCAB) == pytest.approx(expected, rel=1e-12)


def test_unigram_entropy_of_a_large_split_is_sampled(tmp_path: Path) -> None:
    documents = random_documents(1000, VOCAB, seed=3, longest=6000)
    prefix = write_indexed(tmp_path / "large", documents)
    valid = build(10, 10, train_data_path=[prefix], valid_data_path=[prefix]).valid
    assert unigram_entropy(valid, VOCAB) == pytest.approx(entropy(documents), rel=1e-12)
    sampled = unigram_entropy(valid, VOCAB, limit_tokens=1 << 20)
    assert sampled == pytest.approx(entropy(documents), rel=1e-3)
    assert sampled != unigram_entropy(valid, VOCAB)
