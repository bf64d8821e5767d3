"""A tokenizer and a dense model that the tests share."""

from __future__ import annotations

import pytest

from megatron_crnet.analysis.source import SourceModel, open_source
from tests.helpers import ARCHITECTURES
from tests.unit.analysis.models import dense_checkpoint
from tests.unit.data_helpers import train_small_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer"), 400)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> SourceModel:
    return open_source(dense_checkpoint(tmp_path_factory.mktemp("dense"), tokenizer))


@pytest.fixture(scope="session")
def dense_moe(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> SourceModel:
    """The same with experts."""
    return open_source(dense_checkpoint(tmp_path_factory.mktemp("dense_moe"), tokenizer, **ARCHITECTURES["qwen3_moe"]))


@pytest.fixture(scope="session")
def dense_gpt2(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> SourceModel:
    """The same with biases, outside of the maps."""
    model = {**ARCHITECTURES["gpt2"], "num_query_groups": None}
    return open_source(dense_checkpoint(tmp_path_factory.mktemp("gpt2"), tokenizer, **model))


@pytest.fixture(scope="session")
def dense_qwen3(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> SourceModel:
    """The same with a norm of each head."""
    return open_source(dense_checkpoint(tmp_path_factory.mktemp("qwen3"), tokenizer, **ARCHITECTURES["qwen3"]))
