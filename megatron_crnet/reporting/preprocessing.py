"""Preprocessing against a simple loop: one process, one document at a time, the same bytes."""

from __future__ import annotations

import filecmp
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from megatron_crnet.data.corpus import iter_documents
from megatron_crnet.data.decompression import beginning, compression_of
from megatron_crnet.data.preprocess import preprocess
from megatron_crnet.data.standard_library import write_corpus
from megatron_crnet.data.train_tokenizer import train_sentencepiece
from megatron_crnet.utils.errors import DataError, require_positive


def simple_loop(corpus: Path, out_prefix: Path, tokenizer_model: str) -> None:
    """The baseline."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    processor = SentencePieceProcessor(model_file=tokenizer_model)
    builder = IndexedDatasetBuilder(f"{out_prefix}.bin", dtype=DType.optimal_dtype(processor.vocab_size()))
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"] if line.strip() else ""
            if text.strip():
                ids = [*processor.encode(text), processor.eos_id()]
                builder.add_document(ids, [len(ids)])
    builder.finalize(f"{out_prefix}.idx")


def measure_preprocessing(
    folder: Path,
    corpus: Path | None,
    tokenizer_model: str | None,
    *,
    vocab_size: int,
    workers: int,
    repeats: int,
    copies: Sequence[int],
) -> list[dict[str, Any]]:
    """Prepare what is None of corpus and tokenizer in `folder`, then measure each number of copies of the corpus.

    Raises:
        ConfigError: a number is not above 0.
        DataError: the corpus cannot be read.
    """
    require_positive("benchmark", repeats=repeats, copies=min(copies))
    if corpus is None:
        write_corpus(folder)
        corpus = folder / "train.jsonl"
    texts = list(iter_documents([corpus], strict=True, file_format="jsonl"))
    data = corpus.read_bytes()
    data = beginning(data, compression_of(data)).rstrip() + b"\n"  # all of it, as it is repeated
    model = tokenizer_model or str(train_sentencepiece(texts, folder / "tok", vocab_size))
    results = []
    for count in copies:
        repeated = folder / f"copies-{count}.jsonl"
        repeated.write_bytes(data * count)
        results.append({"copies": count, **_measure(repeated, folder, model, workers, repeats)})
    return results


def _measure(corpus: Path, folder: Path, model: str, workers: int, repeats: int) -> dict[str, Any]:
    """Median seconds and rates of both, which take turns."""
    ours = partial(preprocess, [corpus], folder / "ours", "sentencepiece", model, workers=workers, overwrite=True)
    programs: dict[str, Callable[[], object]] = {
        "loop": partial(simple_loop, corpus, folder / "loop", model),
        "preprocess": ours,
    }
    counts = ours()  # also imports Megatron-Core, which the measured runs then find loaded
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            started = time.perf_counter()
            program()
            seconds[name].append(time.perf_counter() - started)
    for suffix in ("bin", "idx"):
        if not filecmp.cmp(folder / f"ours.{suffix}", folder / f"loop.{suffix}", shallow=False):
            raise DataError(f"the two wrote different .{suffix} files: this is a defect, report it")
    medians, megabytes = {name: statistics.median(values) for name, values in seconds.items()}, counts.text_bytes / 1e6
    return {
        "documents": counts.documents,
        "megabytes": megabytes,
        "tokens": counts.tokens,
        "seconds": seconds,
        "median_seconds": medians,
        "documents_per_second": {name: counts.documents / median for name, median in medians.items()},
        "megabytes_per_second": {name: megabytes / median for name, median in medians.items()},
        "speedup": medians["loop"] / medians["preprocess"],
    }
