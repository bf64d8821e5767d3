"""Loss and perplexity of a trained model, an export or a checkpoint, over text or token files.

    python tools/evaluate.py --model exports/quickstart --data data/quickstart/valid
    python tools/evaluate.py --model runs/quickstart --text my/text
    python tools/evaluate.py --model runs/quickstart --validation-of runs/quickstart/config.yaml

`loss` is in nats a token, the mean over all tokens. `galore_compatible_loss` is what the scripts derived from GaLore's
report: the sum of the batches' mean losses divided by their number plus one. It depends on --batch-size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_crnet.errors import reported, require_positive

if TYPE_CHECKING:
    from megatron_crnet.evaluation import Row
    from megatron_crnet.inference import OpenModel


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an export, a checkpoint, or the folder of a run")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="PREFIX", help="PREFIX.bin and PREFIX.idx")
    source.add_argument("--text", help="a file or folder, as for preprocess_data.py")
    source.add_argument("--validation-of", metavar="CONFIG", help="the samples that a run with this YAML validates on")
    parser.add_argument("--seq-length", type=int, help="tokens in a row (default: max_position_embeddings)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows in a forward pass (default: %(default)s)")
    parser.add_argument(
        "--sample-format",
        choices=("packed", "padded"),
        default="packed",
        help="packed: documents joined and cut, every token once; padded: one document a row, cut (default: packed)",
    )
    parser.add_argument("--max-tokens", type=int, help="stop after that many (default: all)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--tokenizer", help="path of the tokenizer (default: the model's own)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def rows_of(args: argparse.Namespace, opened: OpenModel) -> Iterator[Row]:
    """What the command line asks to be measured."""
    from megatron_crnet import evaluation
    from megatron_crnet.settings import load_config

    if args.validation_of:
        return evaluation.validation_rows(load_config(args.validation_of), opened.tokenizer)
    if args.data:
        documents = evaluation.indexed_documents(args.data, opened.tokenizer)
    else:
        documents = evaluation.text_documents(args.text, opened.tokenizer)
    length = args.seq_length or opened.longest
    if args.sample_format == "padded":
        return evaluation.padded_rows(documents, length, opened.tokenizer.pad)
    return evaluation.packed_rows(documents, length)


def run(args: argparse.Namespace) -> dict[str, float]:
    """The figures by name."""
    numbers = {"seq_length": args.seq_length, "batch_size": args.batch_size, "max_tokens": args.max_tokens}
    require_positive("evaluation", **{name: value for name, value in numbers.items() if value is not None})
    from megatron_crnet.cpu_platform import quiet_libraries
    from megatron_crnet.evaluation import evaluate, first_tokens
    from megatron_crnet.inference import open_model

    quiet_libraries()
    opened = open_model(args.model, dtype=args.dtype, tokenizer=args.tokenizer)
    for note in opened.notes:
        print(f"warning: {note}", file=sys.stderr)
    rows = rows_of(args, opened)
    if args.max_tokens is not None:
        rows = first_tokens(rows, args.max_tokens)
    return dataclasses.asdict(evaluate(opened.model, rows, args.batch_size))


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
