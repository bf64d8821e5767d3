"""Compare preprocess_data.py with a straightforward loop: one process, one document at a time.

Both read the same JSON lines, use the same tokenizer and write the same bytes through Megatron-Core's builder;
the import of Megatron-Core, which both need, is not counted, the start of the workers is. Runs take turns,
so that a busy machine slows both.

    python tools/benchmark_preprocess.py --workers 2 --repeats 5 --copies 1 8
"""

from __future__ import annotations

from megatron_crnet.utils.errors import ctrl_c_is_one_line

if __name__ == "__main__":
    ctrl_c_is_one_line()  # during the imports below as well

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from megatron_crnet.config.options import ToolParser
from megatron_crnet.data.corpus import iter_documents
from megatron_crnet.data.decompression import beginning, compression_of
from megatron_crnet.data.preprocess import available_cpus, preprocess
from megatron_crnet.data.standard_library import write_corpus
from megatron_crnet.data.train_tokenizer import train_sentencepiece
from megatron_crnet.utils.errors import DataError, reported, require_positive
from megatron_crnet.utils.record_file import check_record_file, write_record


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


def print_table(results: list[dict[str, Any]]) -> None:
    """One line a run of each kind."""
    print(f"{'':12} {'MB':>7} {'documents':>10} {'seconds':>8} {'documents/s':>12} {'MB/s':>7} {'speed-up':>9}")
    for result in results:
        for name, speedup in (("loop", ""), ("preprocess", f"{result['speedup']:.2f}x")):
            seconds = result["median_seconds"][name]
            documents, megabytes = result["documents"], result["megabytes"]
            print(
                f"{name:12} {megabytes:7.1f} {documents:10,} {seconds:8.2f} {documents / seconds:12,.0f} "
                f"{megabytes / seconds:7.2f} {speedup:>9}"
            )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, help="a .jsonl file (default: the standard library's training part)")
    parser.add_argument("--tokenizer-model", help="a SentencePiece .model (default: one trained on the corpus)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the trained tokenizer (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=available_cpus(), help="default: one for each CPU")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, taking turns (default: %(default)s)")
    parser.add_argument(
        "--copies",
        type=int,
        nargs="+",
        default=[1, 8],
        help="how often the corpus is repeated; more copies make the workers' start weigh less (default: 1 8)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--overwrite", action="store_true", help="replace an older file")
    return parser.parse_args()


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Prepare the corpus and the tokenizer in `folder`, then measure each number of copies.

    Raises:
        ConfigError: a number is not above 0.
        DataError: the corpus cannot be read.
    """
    require_positive("benchmark", repeats=args.repeats, copies=min(args.copies))
    corpus = args.corpus
    if corpus is None:
        write_corpus(folder)
        corpus = folder / "train.jsonl"
    texts = list(iter_documents([corpus], strict=True, file_format="jsonl"))
    data = corpus.read_bytes()
    data = beginning(data, compression_of(data))  # all of it
    model = args.tokenizer_model or str(train_sentencepiece(texts, folder / "tok", args.vocab_size))
    results = []
    for copies in args.copies:
        repeated = folder / f"copies-{copies}.jsonl"
        repeated.write_bytes(data * copies)
        results.append({"copies": copies, **measure(repeated, folder, model, args.workers, args.repeats)})
    return results


def show(args: argparse.Namespace) -> int:
    """Measure and write."""
    check_record_file(args.json, overwrite=args.overwrite)
    with tempfile.TemporaryDirectory() as folder:
        results = run(args, Path(folder))
    print_table(results)
    if args.json is not None:
        from megatron_crnet.utils.environment import provenance

        record = {**provenance("preprocessing", sys.argv), "workers": args.workers, "rows": results}
        write_record(args.json, record)
    return 0


def main() -> int:
    """Run; returns the exit status."""
    args = parse_arguments()
    return reported(lambda: show(args))


if __name__ == "__main__":
    sys.exit(main())
