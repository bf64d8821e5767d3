"""Compare `crnet preprocess` with a simple loop: one process, one document at a time.

    %(prog)s --workers 2 --repeats 5 --copies 1 8

Both read the same JSON lines, use the same tokenizer and write the same bytes through Megatron-Core's builder;
the import of Megatron-Core, which both need, is not counted, the start of the workers is. Runs take turns,
so that a busy machine slows both.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from megatron_crnet.cli.main import Call
from megatron_crnet.config.options import ToolParser
from megatron_crnet.utils.environment import available_cpus
from megatron_crnet.utils.record_file import add_record_options, check_record_file, report_record
from megatron_crnet.utils.tables import table


def build_parser(prog: str) -> ToolParser:
    """The options."""
    parser = ToolParser(prog=prog, description=__doc__)
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
    add_record_options(parser)
    return parser


def figures(results: list[dict[str, Any]]) -> str:
    """A row per kind and number of copies."""
    rows = [
        (
            name,
            f"{result['megabytes']:.1f}",
            f"{result['documents']:,}",
            f"{seconds:.2f}",
            f"{result['documents_per_second'][name]:,.0f}",
            f"{result['megabytes_per_second'][name]:.2f}",
            f"{result['median_seconds']['loop'] / seconds:.2f}x",
        )
        for result in results
        for name, seconds in result["median_seconds"].items()
    ]
    return table(("", "MB", "documents", "seconds", "documents/s", "MB/s", "speed-up"), rows)


def run(call: Call) -> int:
    """Measure and write."""
    args = build_parser(call.prog).parse_args(call.argv)
    check_record_file(args.json, overwrite=args.overwrite)
    from megatron_crnet.reporting.preprocessing import measure_preprocessing
    from megatron_crnet.utils.environment import run_metadata

    with tempfile.TemporaryDirectory() as folder:
        results = measure_preprocessing(
            Path(folder),
            args.corpus,
            args.tokenizer_model,
            vocab_size=args.vocab_size,
            workers=args.workers,
            repeats=args.repeats,
            copies=args.copies,
        )
    record = {**run_metadata("preprocessing", call.words), "workers": args.workers, "rows": results}
    report_record(args.json, record, figures(results))
    return 0
