"""Turns text into Megatron-Core's `.bin`/`.idx` with several processes.

The reader (this process) decompresses and hands out raw chunks, the workers decode and tokenise them, and
this process writes the results in order, so the bytes do not depend on the number of workers. Neither
torch nor Megatron-Core, whose import takes seconds, is needed before `_write`: the workers are at work by then.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron_crnet.atomic import atomic_files, refuse_existing, sigterm_unwinds
from megatron_crnet.corpus import CHUNK_BYTES, Chunk, CorpusStats, Rules, chunk_documents, list_files, read_chunks
from megatron_crnet.errors import ConfigError, DataError
from megatron_crnet.fingerprint import sidecar, write_sidecar
from megatron_crnet.progress import Progress
from megatron_crnet.tokenizer import Tokenizer, TokenizerKind, load_tokenizer
from megatron_crnet.worker_pool import ordered_map


@dataclass(frozen=True)
class PreprocessResult:
    """What was written and what was skipped; the counts are those of CorpusStats."""

    documents: int
    tokens: int
    """Token ids in the .bin, the ends of documents included."""
    text_bytes: int
    empty: int
    invalid_utf8: int
    invalid_json: int
    missing_text: int
    seconds: float

    @property
    def skipped(self) -> int:
        """Documents that were left out."""
        return self.empty + self.invalid_utf8 + self.invalid_json + self.missing_text


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
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> PreprocessResult:
    """Tokenise the documents of `paths` into OUT_PREFIX.bin and OUT_PREFIX.idx, and say beside them by which tokenizer.

    Nothing appears under these names unless all of it is there; temporary files are removed on an
    exception, SIGINT and SIGTERM.

    Args:
        paths: files and folders, see `corpus.py`.
        workers: processes that tokenise; 0 does it in this process, None means one for each CPU.
        append_eod: end every document with the tokenizer's `eod`.
        strict: refuse the first line or file that cannot be decoded, instead of counting it.
        progress: called after every chunk.
        chunk_bytes: size of a unit of work; it does not change the output.

    Raises:
        ConfigError: `workers` is negative, or no such `tokenizer_type`.
        DataError: input missing, damaged or without a single document; output exists or cannot be written.
        CrnetError: a worker process died.
    """
    started = time.monotonic()
    workers = available_cpus() if workers is None else workers
    if workers < 0:
        raise ConfigError(f"workers is {workers}, but must not be negative: use 0 to stay in one process")
    files = list_files(paths)
    total_bytes = sum(file.stat().st_size for file in files)
    tokenizer = load_tokenizer(tokenizer_type, tokenizer_model)
    tokenize_chunk = partial(_tokenize_chunk, tokenizer, append_eod, Rules(text_key, strict))
    pair = Path(f"{out_prefix}.bin"), Path(f"{out_prefix}.idx")
    if not overwrite:
        refuse_existing(*pair)  # what says by which tokenizer an older pair was made does not outlive it

    def report(stats: CorpusStats, input_bytes: int) -> None:
        if progress is not None:
            seconds = time.monotonic() - started
            progress(Progress(stats.documents, stats.text_bytes, input_bytes, total_bytes, seconds))

    with (
        sigterm_unwinds(),
        atomic_files(pair[0], sidecar(out_prefix), pair[1], overwrite=True) as (bin_path, about, idx_path),
        ordered_map(workers, read_chunks(files, chunk_bytes), tokenize_chunk) as chunks,
    ):
        stats, tokens = _write(chunks, (bin_path, idx_path), tokenizer.vocab_size, report)
        write_sidecar(about, bin_path, idx_path, tokenizer, append_eod)
    return PreprocessResult(tokens=tokens, seconds=time.monotonic() - started, **asdict(stats))


def available_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tokenize_chunk(tokenizer: Tokenizer, append_eod: bool, rules: Rules, chunk: Chunk) -> TokenizedChunk:
    """The work of a worker process: from a raw chunk to token ids."""
    stats = CorpusStats()
    tokenized = tokenizer.tokenize_batch(chunk_documents(chunk, rules, stats))
    documents = [ids for ids in tokenized if len(ids)]
    stats.documents -= len(tokenized) - len(documents)
    stats.empty += len(tokenized) - len(documents)
    end = np.array([tokenizer.eod] if append_eod else [], dtype=np.int32)
    parts = [part for ids in documents for part in (ids, end)]
    tokens = np.concatenate(parts, dtype=np.int32) if parts else end[:0]
    lengths = np.array([len(ids) + len(end) for ids in documents], dtype=np.int32)
    return TokenizedChunk(tokens.tobytes(), lengths.tobytes(), stats, chunk.input_bytes)


def _write(
    chunks: Iterable[TokenizedChunk],
    outputs: Sequence[Path],
    vocab_size: int,
    report: Callable[[CorpusStats, int], None],
) -> tuple[CorpusStats, int]:
    """Write all chunks as .bin and .idx; returns the counts and the number of tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at import it mentions every optional accelerator that is not installed
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    stats, tokens, input_bytes = CorpusStats(), 0, 0
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
            report(stats, input_bytes)
        if not stats.documents:
            raise DataError(_nothing_left(stats))
        builder.finalize(str(idx_path))
    return stats, tokens


def _nothing_left(stats: CorpusStats) -> str:
    return (
        f"the corpus holds no document ({stats.empty} empty, {stats.invalid_utf8} not UTF-8, {stats.invalid_json} not "
        f"a JSON object, {stats.missing_text} without the text key): give files with text, or correct --text-key"
    )
