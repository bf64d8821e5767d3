"""Turns text into Megatron-Core's `.bin`/`.idx` with several processes.

The reader (this process) decompresses and hands out raw chunks, the workers decode and tokenise them, and
this process writes the results in order, so the bytes do not depend on the number of workers. Neither
torch nor Megatron-Core, whose import takes seconds, is needed before `_write`: the workers are at work by then.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron_crnet.data.corpus import (
    CHUNK_BYTES,
    Chunk,
    Rules,
    chunk_documents,
    chunk_places,
    open_corpus,
    read_chunks,
)
from megatron_crnet.data.corpus_files import Format, check_outside
from megatron_crnet.data.corpus_stats import CorpusStats
from megatron_crnet.data.fingerprint import sidecar, write_sidecar
from megatron_crnet.data.tokenizer import Tokenizer, TokenizerKind, load_tokenizer
from megatron_crnet.data.worker_pool import ordered_map
from megatron_crnet.utils.environment import available_cpus
from megatron_crnet.utils.errors import ConfigError, DataError
from megatron_crnet.utils.files import atomic_files, output_files, refuse_existing, sigterm_unwinds
from megatron_crnet.utils.progress import Progress

MOST_WORKERS = 64
"""Processes that may be asked for on any machine; on larger ones, four for each CPU."""


@dataclass(frozen=True)
class PreprocessResult:
    """What was written and what was skipped."""

    stats: CorpusStats
    tokens: int
    """Token ids in the .bin, the ends of documents included."""
    seconds: float

    @property
    def documents(self) -> int:
        """Documents in the .bin."""
        return self.stats.documents

    @property
    def text_bytes(self) -> int:
        """Their UTF-8 size."""
        return self.stats.text_bytes

    @property
    def skipped(self) -> int:
        """Documents that were left out."""
        return self.stats.skipped


@dataclass(frozen=True)
class TokenizedChunk:
    """A worker's answer: token ids of all documents joined and their lengths, both int32, and the counts."""

    tokens: bytes
    lengths: bytes
    stats: CorpusStats
    input_bytes: int


def preprocess(
    paths: Sequence[str | Path],
    out_prefix: str | Path,
    tokenizer_type: TokenizerKind,
    tokenizer_model: str,
    *,
    workers: int | None = None,
    append_eod: bool = True,
    text_key: str = "text",
    strict: bool = False,
    file_format: Format | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> PreprocessResult:
    """Tokenize the documents of `paths` into OUT_PREFIX.bin and OUT_PREFIX.idx, and say beside them by which tokenizer.

    Nothing appears under these names unless all of it is there; temporary files are removed on an
    exception, SIGINT and SIGTERM.

    Args:
        paths: files and folders, see `data/corpus.py`; "-" is standard input.
        workers: processes that tokenize; 0 does it in this process, None means one for each CPU.
        append_eod: end every document with the tokenizer's `eod`.
        text_key: see `corpus.Rules`.
        strict: refuse the first line or file that cannot be decoded, instead of counting it.
        file_format: how every file is read; None goes by the suffix.
        progress: called before the first chunk and after every one.
        chunk_bytes: size of a unit of work; it does not change the output.

    Raises:
        ConfigError: `workers` is negative or beyond sense, or no such `tokenizer_type`.
        DataError: input missing, damaged or without a single document; output exists, lies inside the input or cannot
            be written.
        CrnetError: a worker process died.
    """
    started = time.monotonic()
    workers = available_cpus() if workers is None else workers
    check_workers(workers)
    targets = output_files(out_prefix, ".bin", ".idx")
    stats, rules = CorpusStats(), Rules(text_key, strict, file_format)
    listing = open_corpus(paths, rules, stats)
    check_outside((*targets, sidecar(out_prefix)), paths)
    if not overwrite:
        refuse_existing(*targets)  # what says by which tokenizer an older pair was made does not outlive it
    tokenizer = load_tokenizer(tokenizer_type, tokenizer_model)
    tokenize_chunk = partial(_tokenize_chunk, tokenizer, append_eod, rules)

    def report(input_bytes: int, tokens: int) -> None:
        if progress is not None:
            seconds = time.monotonic() - started
            total = listing.total_bytes
            progress(
                Progress(stats.documents, stats.text_bytes, tokens, input_bytes, total, len(listing.files), seconds)
            )

    with (
        sigterm_unwinds(),
        atomic_files(targets[0], sidecar(out_prefix), targets[1], overwrite=True) as (bin_path, about, idx_path),
        ordered_map(workers, read_chunks(listing.files, chunk_bytes, text_key), tokenize_chunk) as chunks,
    ):
        report(0, 0)
        tokens = _write(chunks, (bin_path, idx_path), tokenizer.vocab_size, stats, report)
        write_sidecar(about, bin_path, idx_path, tokenizer, append_eod)
    return PreprocessResult(stats, tokens, time.monotonic() - started)


def check_workers(workers: int) -> None:
    """Raise ConfigError for a number of processes that makes no sense here."""
    most = max(MOST_WORKERS, 4 * available_cpus())
    if not 0 <= workers <= most:
        raise ConfigError(
            f"workers is {workers}, but must be 0 to {most} on {available_cpus()} CPUs: leave it out for one per CPU, "
            "or use 0 to stay in one process"
        )


def _tokenize_chunk(tokenizer: Tokenizer, append_eod: bool, rules: Rules, chunk: Chunk) -> TokenizedChunk:
    """The work of a worker process: from a raw chunk to token ids."""
    stats = CorpusStats()
    texts = chunk_documents(chunk, rules, stats)
    tokenized = tokenizer.tokenize_batch(texts)
    kept = [ids for ids in tokenized if len(ids)]
    if len(kept) < len(tokenized):
        for text, ids, (source, place) in zip(texts, tokenized, chunk_places(chunk, rules), strict=True):
            if not len(ids):
                stats.documents -= 1
                stats.text_bytes -= len(text.encode())
                stats.skip(source, "empty", place)
    end = np.array([tokenizer.eod] if append_eod else [], dtype=np.int32)
    parts = [part for ids in kept for part in (ids, end)]
    tokens = np.concatenate(parts, dtype=np.int32) if parts else end[:0]
    lengths = np.array([len(ids) + len(end) for ids in kept], dtype=np.int32)
    return TokenizedChunk(tokens.tobytes(), lengths.tobytes(), stats, chunk.input_bytes)


def _write(
    chunks: Iterable[TokenizedChunk],
    outputs: Sequence[Path],
    vocab_size: int,
    stats: CorpusStats,
    report: Callable[[int, int], None],
) -> int:
    """Write all chunks as .bin and .idx, counting into `stats`; returns the number of tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at import it mentions every optional accelerator that is not installed
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokens, input_bytes = 0, 0
    bin_path, idx_path = outputs
    builder = IndexedDatasetBuilder(str(bin_path), dtype=DType.optimal_dtype(vocab_size))
    with builder.data_file:
        for chunk in chunks:
            lengths = np.frombuffer(chunk.lengths, dtype=np.int32)
            ends = np.cumsum(lengths)
            for document in np.split(np.frombuffer(chunk.tokens, dtype=np.int32), ends[:-1]) if len(lengths) else []:
                builder.add_document(document, [len(document)])
            tokens += int(lengths.sum())
            stats.add(chunk.stats)
            input_bytes += chunk.input_bytes
            report(input_bytes, tokens)
        if not stats.documents:
            raise DataError(
                f"the corpus holds no document ({stats.totals()}): give files with text, or correct --text-key"
            )
        builder.finalize(str(idx_path))
    return tokens
