"""Write the running Python's standard library as a corpus: FOLDER/train.jsonl and FOLDER/valid.jsonl.

One file of the library is one document. A file belongs to one of the two by its name, so both stay the same
from run to run. Nothing is done when the folder already holds the corpus of the same files.

    python tools/make_corpus.py corpus
"""

from __future__ import annotations

from megatron_crnet.utils.errors import ctrl_c_is_one_line

if __name__ == "__main__":
    ctrl_c_is_one_line()  # during the imports below as well

import argparse
import sys
from pathlib import Path

from megatron_crnet.config.options import ToolParser
from megatron_crnet.data.standard_library import write_corpus
from megatron_crnet.utils.errors import reported


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument(
        "--valid-fraction", type=float, default=0.05, help="share of the files for validation (default: %(default)s)"
    )
    return parser.parse_args()


def run(args: argparse.Namespace) -> int:
    """Write the corpus."""
    summary = write_corpus(args.folder, args.valid_fraction)
    print(summary)
    return 0


def main() -> int:
    """Run; returns the exit status."""
    args = parse_arguments()
    return reported(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
