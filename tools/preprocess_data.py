"""Turn text into Megatron-Core's .bin/.idx.

python tools/preprocess_data.py corpus/train.jsonl --output data/train --tokenizer-model tokenizer.model
"""

from __future__ import annotations

from megatron_crnet.utils.errors import ctrl_c_is_one_line

if __name__ == "__main__":
    ctrl_c_is_one_line()  # during the imports below as well

import argparse
import sys

from megatron_crnet.config.options import ToolParser
from megatron_crnet.data.preprocess import available_cpus, preprocess
from megatron_crnet.utils.errors import reported
from megatron_crnet.utils.progress import ProgressPrinter


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "input",
        nargs="+",
        help="files or folders; .json, .jsonl and .ndjson hold one JSON object per line, .parquet one document per "
        "row, any other file is one document; gzip, zstd, bzip2 and xz are decompressed; - is standard "
        "input, with --format",
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--tokenizer-model", required=True, help="SentencePiece .model file or Hugging Face folder")
    parser.add_argument("--tokenizer-type", choices=("sentencepiece", "huggingface"), default="sentencepiece")
    parser.add_argument(
        "--text-key",
        default="text",
        help="key of the text in a JSON object, or column of a Parquet file; data.text is text in the object data, "
        "unless there is a key with the dot in it (default: text)",
    )
    parser.add_argument(
        "--format", choices=("jsonl", "text", "parquet"), help="read every file so, whatever its suffix"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=available_cpus(),
        help="processes that tokenize; 0 uses none (default: one for each CPU, here %(default)s)",
    )
    parser.add_argument("--no-append-eod", action="store_true", help="do not end documents with the end token")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first line, file or link that cannot be read, with status 2; otherwise what was left "
        "out is named, file by file, and the status is 0",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args()


def run(args: argparse.Namespace) -> int:
    """Write the files and say what is in them."""
    with ProgressPrinter() as progress:
        result = preprocess(
            args.input,
            args.output,
            args.tokenizer_type,
            args.tokenizer_model,
            workers=args.workers,
            append_eod=not args.no_append_eod,
            text_key=args.text_key,
            strict=args.strict,
            file_format=args.format,
            overwrite=args.overwrite,
            progress=progress,
        )
    print(
        f"{args.output}: {result.documents:,} documents, {result.tokens:,} tokens, {result.text_bytes:,} bytes of text "
        f"in {result.seconds:.1f} s"
    )
    for line in result.stats.summary():
        print(line)
    return 0


def main() -> int:
    """Run; returns the exit status."""
    args = parse_arguments()
    return reported(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
