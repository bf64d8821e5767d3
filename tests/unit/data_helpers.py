"""What the tests of the data stack share: small corpora, index files and tokenizers."""

from __future__ import annotations

import functools
import io
import json
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from torch import Tensor

from megatron_crnet.config.schema import Config, DataConfig, ModelConfig, TrainingConfig
from megatron_crnet.data.corpus import iter_documents
from megatron_crnet.data.corpus_stats import CorpusStats
from megatron_crnet.data.datasets import Datasets, build_datasets
from megatron_crnet.data.standard_library import standard_library_files
from megatron_crnet.data.tokenizer import Ids, Tokenizer
from megatron_crnet.data.train_tokenizer import train_sentencepiece


@functools.cache
def _library() -> list[Path]:
    return list(standard_library_files().values())


def library_texts(count: int) -> list[str]:
    """Some real source files."""
    files = _library()
    return [path.read_text(encoding="utf-8") for path in files[:: len(files) // count]][:count]


def train_small_tokenizer(folder: Path, vocab_size: int = 600) -> str:
    """A SentencePiece model of source code; returns its path."""
    return str(train_sentencepiece(library_texts(20), folder / "small", vocab_size, sample_bytes=100_000))


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """One document a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_indexed(prefix: Path, documents: Sequence[Sequence[int]], dtype: type[np.integer] = np.uint16) -> str:
    """PREFIX.bin and PREFIX.idx with the given token ids; returns the prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def read_indexed(prefix: Path) -> list[list[int]]:
    """The documents of PREFIX.bin. Copies: Megatron-Core's arrays do not outlive their dataset, a read then crashes."""
    dataset = IndexedDataset(str(prefix))
    return [ids.tolist() for ids in dataset[:]]


def random_documents(count: int, vocab_size: int, seed: int, longest: int = 60) -> list[list[int]]:
    """Documents of 2 to `longest` ids, skewed towards small ids so that their entropy is not the uniform one."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest, count, endpoint=True)
    return [(2 + generator.random(n) ** 2 * (vocab_size - 2)).astype(int).tolist() for n in lengths]


class PlainTokenizer(Tokenizer):
    """A tokenizer for datasets that exist already."""

    def __init__(self, vocab_size: int = 128, eod: int = 1, pad: int = 0) -> None:
        self.vocab_size, self.eod, self.pad = vocab_size, eod, pad
        self.unique_identifiers = OrderedDict(vocab_size=str(vocab_size))

    def tokenize_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Bytes."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()


VOCAB, SEQ = 128, 16
"""Vocabulary and sequence length of the datasets here."""


def data_config(*, vocab_size: int = 128, seq_length: int = 16, seed: int = 1234, **data: Any) -> Config:
    """A configuration with a data section."""
    return Config(
        model=ModelConfig(vocab_size=vocab_size),
        training=TrainingConfig(seq_length=seq_length, seed=seed),
        data=DataConfig(**data),
    )


def build(
    train: int, valid: int = 0, test: int = 0, *, tokenizer: Any = None, seed: int = 1234, **data: Any
) -> Datasets:
    """Datasets for a data section."""
    config = data_config(vocab_size=VOCAB, seq_length=SEQ, seed=seed, **data)
    return build_datasets(config, tokenizer or PlainTokenizer(VOCAB), train, valid, test)


def whole(sample: dict[str, Tensor]) -> list[int]:
    """The s + 1 ids behind a sample."""
    return [*sample["tokens"].tolist(), int(sample["labels"][-1])]


def write_even_and_odd(folder: Path) -> list[str]:
    """Two prefixes: even ids in the first, odd ids in the second, which has twice the documents."""
    parts = []
    for i, count in ((0, 100), (1, 200)):
        documents = [[2 * (x // 2) + i for x in d] for d in random_documents(count, VOCAB, seed=i, longest=50)]
        parts.append(write_indexed(folder / f"part{i}", documents))
    return parts


TEXTS = ["first", "second", "third"]


def lines(texts: list[str] = TEXTS) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def read(*paths: Path, **options: object) -> tuple[list[str], list[str]]:
    """The documents and the summary."""
    stats = CorpusStats()
    return list(iter_documents(paths, stats=stats, **options)), stats.summary()  # type: ignore[arg-type]


def write_parquet(path: Path, rows: list[dict[str, object]], **options: object) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def give_standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(data))))  # type: ignore[arg-type]
