"""Options of the commands that run calibration text through a model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_crnet.utils.errors import require, require_positive

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_crnet.analysis.source import SourceModel


def add_calibration_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """`--text` or `--data`, how much of it, and how it is cut."""
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--text", type=Path, help="calibration text: a file or folder, as for crnet preprocess")
    source.add_argument("--prefix", help="the same from PREFIX.bin and PREFIX.idx")
    parser.add_argument("--tokens", type=int, default=65536, help="of it, in whole rows (default: %(default)s)")
    parser.add_argument("--seq-length", type=int, help="tokens in a row (default: max_position_embeddings)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows at once (default: %(default)s)")
    parser.add_argument("--tokenizer", help="path of the tokenizer (default: the model's own)")


def check_calibration(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    require(args.prefix != "" and args.tokenizer != "", "--prefix or --tokenizer is empty: give a path")
    numbers = {"tokens": args.tokens, "batch_size": args.batch_size, "seq_length": args.seq_length}
    require_positive("calibration", **{name: value for name, value in numbers.items() if value is not None})


def open_named(path: Path, args: argparse.Namespace) -> SourceModel:
    """The model of a command line; newer checkpoints that are damaged are named."""
    from megatron_crnet.analysis.source import open_source
    from megatron_crnet.distributed.cpu_backend import quiet_libraries

    quiet_libraries()
    source = open_source(path, args.tokenizer)
    for note in source.notes:
        print(f"warning: {note}", file=sys.stderr)
    return source


def read_rows(source: SourceModel, args: argparse.Namespace) -> Tensor | None:
    """The rows of a command line; None where it gives no text."""
    if args.text is None and args.prefix is None:
        return None
    from megatron_crnet.analysis.source import calibration_rows

    return calibration_rows(source, text=args.text, prefix=args.prefix, tokens=args.tokens, seq_length=args.seq_length)
