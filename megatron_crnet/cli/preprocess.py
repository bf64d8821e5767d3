"""Turn text into Megatron-Core's .bin/.idx.

    %(prog)s corpus/train.jsonl --output data/train --tokenizer-model tokenizer.model
    zcat dump.jsonl.gz | %(prog)s - --format jsonl --output data/dump --tokenizer-model tokenizer.model

What was left out is named at the end, file by file.
"""

from __future__ import annotations

from megatron_crnet.cli.main import Call
from megatron_crnet.config.options import ToolParser
from megatron_crnet.utils.environment import available_cpus


def build_parser(prog: str) -> ToolParser:
    """The options."""
    parser = ToolParser(prog=prog, description=__doc__)
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
        help="processes that tokenize; 0 uses none (default: one per CPU, here %(default)s)",
    )
    parser.add_argument("--no-append-eod", action="store_true", help="do not end documents with the end token")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first line, file or link that cannot be read, with status 2; otherwise what was left "
        "out is named, file by file, and the status is 0",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


def run(call: Call) -> int:
    """Write the files and say what is in them."""
    args = build_parser(call.prog).parse_args(call.argv)
    from megatron_crnet.data.preprocess import preprocess
    from megatron_crnet.utils.progress import ProgressPrinter

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
    for line in result.summary():
        print(line)
    return 0
