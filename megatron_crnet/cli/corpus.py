"""Write the running Python's standard library as a corpus: FOLDER/train.jsonl and FOLDER/valid.jsonl.

    %(prog)s corpus

One file of the library is one document. A file belongs to one of the two by its name, so both stay the same
from run to run. Nothing is done when the folder already holds the corpus of the same files.
"""

from __future__ import annotations

from pathlib import Path

from megatron_crnet.cli.main import Call
from megatron_crnet.config.options import ToolParser


def build_parser(prog: str) -> ToolParser:
    """The options."""
    parser = ToolParser(prog=prog, description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument(
        "--valid-fraction", type=float, default=0.05, help="share of the files for validation (default: %(default)s)"
    )
    return parser


def run(call: Call) -> int:
    """Write the corpus."""
    args = build_parser(call.prog).parse_args(call.argv)
    from megatron_crnet.data.standard_library import write_corpus

    print(write_corpus(args.folder, args.valid_fraction))
    return 0
