"""Turns text into Megatron-Core's `.bin`/`.idx` with several processes.

The reader (this process) decompresses and hands out raw chunks, the workers decode and tokenize them, and this process
writes the results in order, so the bytes do not depend on the number of workers. Neither torch nor Megatron-Core, whose
import takes seconds, is needed before `_write`: the workers are at work by then.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron_crnet.data.corpus import CHUNK_BYTES, Chunk, chunk_documents, read_chunks
from megatron_crnet.data.corpus_files import Format, Rules, check_outside, list_files, total_bytes
from megatron_crnet.data.corpus_stats import CorpusStats
from megatron_crnet.data.fingerprint import sidecar, write_sidecar
from megatron_crnet.data.tokenizer import Ids, Tokenizer, TokenizerKind, load_tokenizer
from megatron_crnet.data.worker_pool import ordered_map
from megatron_crnet.utils.environment import available_cpus
from megatron_crnet.utils.errors import DataError, require
from megatron_crnet.utils.files import atomic_files, output_files, refuse_existing, sigterm_unwinds
from megatron_crnet.utils.progress import Progress

MOST_WORKERS = 64
"""Processes that may be asked for on any machine; on larger ones, four per CPU."""


TokenizedChunk = tuple[Ids, Ids, CorpusStats, int]
"""A worker's answer: token ids of all documents joined, their lengths, the counts, and the bytes read from disk."""


@dataclass
class PreprocessResult(CorpusStats):
    """What was written and what was skipped; `tokens` counts the ids in the .bin, the ends of documents included."""

    tokens: int = 0
    seconds: float = 0.0


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
    """Tokenize the documents of `paths` into OUT_PREFIX.bin and .idx, with a sidecar that names the tokenizer.

    Nothing appears under these names unless all of it is there; temporary files are removed on an
    exception, SIGINT and SIGTERM.

    Args:
        paths: files and folders, see `data/corpus.py`; "-" is standard input.
        workers: processes that tokenize; 0 does it in this process, None means one per CPU.
        append_eod: end every document with the tokenizer's `eod`.
        text_key, strict, file_format: see `corpus_files.Rules`.
        progress: called before the first chunk and after every one.
        chunk_bytes: size of a unit of work; it does not change the output.

    Raises:
        ConfigError: `workers` is out of range, or no such `tokenizer_type`.
        DataError: input missing, damaged or without a single document; output exists, lies inside the input or cannot
            be written.
        CrnetError: a worker process died.
    """
    started = time.monotonic()
    workers = available_cpus() if workers is None else workers
    most = max(MOST_WORKERS, 4 * available_cpus())
    require(
        0 <= workers <= most,
        f"workers is {workers}, but must be 0 to {most} on {available_cpus()} CPUs: leave it out for one per CPU, or "
        "use 0 to stay in one process",
    )
    targets = output_files(out_prefix, ".bin", ".idx")
    result, rules = PreprocessResult(), Rules(text_key, strict, file_format)
    files = list_files(paths, rules, result)
    check_outside((*targets, sidecar(out_prefix)), paths)
    if not overwrite:
        refuse_existing(*targets)  # not the sidecar: an older one does not outlive its pair
    tokenizer = load_tokenizer(tokenizer_type, tokenizer_model)
    total = total_bytes(files)

    def report(input_bytes: int) -> None:
        result.seconds = time.monotonic() - started
        if progress is not None:
            counts = result.documents, result.text_bytes, result.tokens
            progress(Progress(*counts, input_bytes, total, len(files), result.seconds))

    with (
        sigterm_unwinds(),
        atomic_files(targets[0], sidecar(out_prefix), targets[1], overwrite=True) as (bin_path, about, idx_path),
        ordered_map(
            workers, read_chunks(files, chunk_bytes, text_key), partial(_tokenize_chunk, tokenizer, append_eod, rules)
        ) as chunks,
    ):
        report(0)
        _write(chunks, bin_path, idx_path, tokenizer.vocab_size, result, report)
        write_sidecar(about, bin_path, idx_path, tokenizer, append_eod)
    result.seconds = time.monotonic() - started
    return result


def _tokenize_chunk(tokenizer: Tokenizer, append_eod: bool, rules: Rules, chunk: Chunk) -> TokenizedChunk:
    """The work of a worker process: from a raw chunk to token ids."""
    stats = CorpusStats()
    documents = chunk_documents(chunk, rules, stats)
    tokenized = tokenizer.tokenize_batch([document[0] for document in documents])
    kept = [ids for ids in tokenized if len(ids)]
    if len(kept) < len(tokenized):
        for ids, (_, size, source, place) in zip(tokenized, documents, strict=True):
            if not len(ids):
                stats.documents -= 1
                stats.text_bytes -= size
                stats.skip(source, "empty", place)
    end = np.array([tokenizer.eod] if append_eod else [], dtype=np.int32)
    parts = [part for ids in kept for part in (ids, end)]
    tokens = np.concatenate(parts, dtype=np.int32) if parts else end[:0]
    lengths = np.array([len(ids) + len(end) for ids in kept], np.int32)
    return tokens, lengths, stats, chunk.input_bytes


def _write(
    chunks: Iterable[TokenizedChunk],
    bin_path: Path,
    idx_path: Path,
    vocab_size: int,
    result: PreprocessResult,
    report: Callable[[int], None],
) -> None:
    """Write all chunks as .bin and .idx, counting into `result`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at import it mentions every optional accelerator that is not installed
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    input_bytes = 0
    builder = IndexedDatasetBuilder(str(bin_path), dtype=DType.optimal_dtype(vocab_size))
    with builder.data_file:
        for tokens, lengths, stats, chunk_bytes in chunks:
            for document in np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []:
                builder.add_document(document, [len(document)])
            result.add(stats)
            result.tokens += len(tokens)
            input_bytes += chunk_bytes
            report(input_bytes)
        if not result.documents:
            raise DataError(
                f"the corpus holds no document ({result.totals()}): give files with text, or correct --text-key"
            )
        builder.finalize(str(idx_path))
