"""The small corpus that the tests of datasets share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.data_helpers import VOCAB, random_documents, write_indexed


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    return random_documents(200, VOCAB, seed=1)


@pytest.fixture
def prefix(tmp_path: Path, documents: list[list[int]]) -> str:
    return write_indexed(tmp_path / "data", documents)
