"""Preprocessing beside a straightforward loop: one process, one document at a time, the same bytes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from megatron_crnet.data.corpus import iter_documents
from megatron_crnet.data.decompression import beginning, compression_of
from megatron_crnet.data.preprocess import preprocess
from megatron_crnet.data.standard_library import write_corpus
from megatron_crnet.data.train_tokenizer import train_sentencepiece
from megatron_crnet.utils.errors import DataError, require_positive


def straightforward(corpus: Path, out_prefix: Path, tokenizer_model: str) -> None:
    """The loop one writes first."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    processor = SentencePieceProcessor(model_file=tokenizer_model)
    builder = IndexedDatasetBuilder(f"{out_prefix}.bin", dtype=DType.optimal_dtype(processor.vocab_size()))
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            if text.strip():
                ids = [*processor.encode(text), processor.eos_id()]
                builder.add_document(ids, [len(ids)])
    builder.finalize(f"{out_prefix}.idx")


def measure(corpus: Path, folder: Path, model: str, workers: int, repeats: int) -> dict[str, Any]:
    """Median seconds and rates of both.

    Raises:
        DataError: their outputs differ.
    """
    # also imports Megatron-Core, which the measured runs then find loaded
    counts = preprocess([corpus], folder / "warm", "sentencepiece", model, workers=workers, overwrite=True)

    def ours() -> None:
        preprocess([corpus], folder / "ours", "sentencepiece", model, workers=workers, overwrite=True)

    def loop() -> None:
        straightforward(corpus, folder / "loop", model)

    seconds: dict[str, list[float]] = {"loop": [], "preprocess": []}
    for _ in range(repeats):
        seconds["loop"].append(timed(loop))
        seconds["preprocess"].append(timed(ours))
    for suffix in ("bin", "idx"):
        if (folder / f"ours.{suffix}").read_bytes() != (folder / f"loop.{suffix}").read_bytes():
            raise DataError(f"the two wrote different .{suffix} files: this is a defect, report it")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "documents": counts.documents,
        "megabytes": counts.text_bytes / 1e6,
        "tokens": counts.tokens,
        "seconds": seconds,
        "median_seconds": medians,
        "documents_per_second": {name: counts.documents / median for name, median in medians.items()},
        "megabytes_per_second": {name: counts.text_bytes / 1e6 / median for name, median in medians.items()},
        "speedup": medians["loop"] / medians["preprocess"],
    }


def timed(function: Callable[[], None]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


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
    data = beginning(data, compression_of(data))  # all of it
    model = tokenizer_model or str(train_sentencepiece(texts, folder / "tok", vocab_size))
    results = []
    for count in copies:
        repeated = folder / f"copies-{count}.jsonl"
        repeated.write_bytes(data * count)
        results.append({"copies": count, **measure(repeated, folder, model, workers, repeats)})
    return results
