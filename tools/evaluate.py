"""Loss and perplexity of a trained model, an export or a checkpoint, over text or token files.

    python tools/evaluate.py --model exports/quickstart --data data/quickstart/valid
    python tools/evaluate.py --model runs/quickstart --text my/text
    python tools/evaluate.py --model runs/quickstart --validation-of runs/quickstart/config.yaml

`loss` is in nats a token, the mean over all tokens. `galore_compatible_loss` is what the scripts derived from GaLore's
report: the sum of the batches' mean losses divided by their number plus one. It depends on --batch-size.
"""

from __future__ import annotations

from megatron_crnet.utils.errors import ctrl_c_is_one_line

if __name__ == "__main__":
    ctrl_c_is_one_line()  # during the imports below as well

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_crnet.config.options import ToolParser
from megatron_crnet.utils.errors import reported, require, require_positive
from megatron_crnet.utils.progress import CountPrinter, ProgressPrinter

if TYPE_CHECKING:
    from megatron_crnet.hf.evaluate import Documents, Row
    from megatron_crnet.hf.generate import OpenModel

LONGEST = 2**20
"""Tokens in a row that --allow-longer allows."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--model", required=True, help="an export, a checkpoint, or the folder of a run")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="PREFIX", help="PREFIX.bin and PREFIX.idx")
    source.add_argument("--text", help="a file or folder, as for preprocess_data.py")
    source.add_argument("--validation-of", metavar="CONFIG", help="the samples that a run with this YAML validates on")
    parser.add_argument("--seq-length", type=int, help="tokens in a row (default: max_position_embeddings)")
    parser.add_argument("--allow-longer", action="store_true", help="rows longer than the model was trained for")
    parser.add_argument("--batch-size", type=int, default=8, help="rows in a forward pass (default: %(default)s)")
    parser.add_argument(
        "--sample-format",
        choices=("packed", "padded"),
        help="packed: documents joined and cut, every token once; padded: one document a row, cut (default: packed)",
    )
    parser.add_argument(
        "--reset-attention-mask",
        action="store_true",
        help="packed rows: attention stays within documents, for models trained so (data.reset_attention_mask); "
        "--validation-of does what its configuration says",
    )
    parser.add_argument("--max-tokens", type=int, help="stop after that many (default: all)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--tokenizer", help="path of the tokenizer (default: the model's own)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    for name in ("model", "data", "text", "validation_of", "tokenizer"):
        require(getattr(args, name) != "", f"--{name.replace('_', '-')} is empty: give a path")
    numbers = {"seq_length": args.seq_length, "batch_size": args.batch_size, "max_tokens": args.max_tokens}
    require_positive("evaluation", **{name: value for name, value in numbers.items() if value is not None})
    if args.validation_of is not None:
        for name in ("seq_length", "sample_format"):
            option = f"--{name.replace('_', '-')}"
            require(getattr(args, name) is None, f"{option} is the run's own with --validation-of: leave it out")
    if args.reset_attention_mask:
        why = "is for packed rows of --data or --text: leave it out"
        require(args.validation_of is None and args.sample_format != "padded", f"--reset-attention-mask {why}")


@dataclass(frozen=True)
class Work:
    """What is to be measured: `count` rows of `length` tokens, with `labels` that count."""

    rows: Iterator[Row]
    length: int
    count: int
    labels: int


def read_documents(args: argparse.Namespace, opened: OpenModel, length: int) -> Documents:
    """The token or text files; what was passed over in the latter is named on standard error."""
    from megatron_crnet.data.corpus_stats import CorpusStats
    from megatron_crnet.hf import evaluate

    if args.data is not None:
        return evaluate.indexed_documents(args.data, opened.tokenizer)
    stats = CorpusStats()
    with ProgressPrinter() as progress:
        documents = evaluate.text_documents(args.text, opened.tokenizer, length, args.max_tokens, stats, progress)
    for line in stats.summary():
        print(line, file=sys.stderr)
    return documents


def work_of(args: argparse.Namespace, opened: OpenModel) -> Work:
    """What the command line asks to be measured."""
    from megatron_crnet.config.loading import load_config
    from megatron_crnet.hf import evaluate

    if args.validation_of is not None:
        training = (config := load_config(args.validation_of)).training
        length, count = training.seq_length, training.eval_steps * training.global_batch_size
        check_length(length, opened, args.allow_longer)
        return Work(evaluate.validation_rows(config, opened.tokenizer), length, count, count * length)
    length, padded = args.seq_length or opened.longest, args.sample_format == "padded"
    check_length(length, opened, args.allow_longer)
    documents = read_documents(args, opened, length)
    if padded:
        rows = evaluate.padded_rows(documents, length, opened.tokenizer.pad)
    else:
        rows = evaluate.packed_rows(documents, length)
        if args.reset_attention_mask:
            rows = evaluate.within_documents(rows, opened.tokenizer.eod)
    return Work(rows, length, *documents.work(length, padded))


def check_length(length: int, opened: OpenModel, allow_longer: bool) -> None:
    """Refuse rows that the model was not made for, unless they are asked for."""
    require(
        length <= opened.longest or allow_longer,
        f"a row of {length} tokens is longer than the model's max_position_embeddings {opened.longest}: lower "
        "--seq-length, or give --allow-longer to measure positions that it was not trained for",
    )
    require(length <= LONGEST, f"a row of {length} tokens is longer than {LONGEST}: lower --seq-length")


def run(args: argparse.Namespace) -> dict[str, float]:
    """The figures by name."""
    check(args)
    from megatron_crnet.distributed.cpu_backend import quiet_libraries
    from megatron_crnet.hf.evaluate import check_memory, evaluate, first_tokens
    from megatron_crnet.hf.generate import open_model

    quiet_libraries()
    opened = open_model(Path(args.model), dtype=args.dtype, tokenizer=args.tokenizer)
    for note in opened.notes:
        print(f"warning: {note}", file=sys.stderr)
    work = work_of(args, opened)
    check_memory(opened.model, min(args.batch_size, work.count), work.length)
    rows, labels = work.rows, work.labels
    if args.max_tokens is not None:
        rows, labels = first_tokens(rows, args.max_tokens), min(args.max_tokens, labels)
    return dataclasses.asdict(evaluate(opened.model, rows, args.batch_size, CountPrinter("tokens", labels)))


def show(args: argparse.Namespace) -> int:
    """Print the figures."""
    found = run(args)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for name, value in found.items():
        print(f"{name:30} {value:,}" if isinstance(value, int) else f"{name:30} {value:.6f}")
    return 0


def main() -> int:
    """Run; returns the exit status."""
    args = parse_arguments()
    return reported(lambda: show(args))


if __name__ == "__main__":
    sys.exit(main())
