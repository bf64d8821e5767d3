"""Compare `crnet preprocess` with a straightforward loop: one process, one document at a time.

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
from megatron_crnet.utils.record_file import check_record_file, write_record


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
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--overwrite", action="store_true", help="replace an older file")
    return parser


def print_table(results: list[dict[str, Any]]) -> None:
    """One line per run of each kind."""
    print(f"{'':12} {'MB':>7} {'documents':>10} {'seconds':>8} {'documents/s':>12} {'MB/s':>7} {'speed-up':>9}")
    for result in results:
        for name, speedup in (("loop", ""), ("preprocess", f"{result['speedup']:.2f}x")):
            seconds = result["median_seconds"][name]
            documents, megabytes = result["documents"], result["megabytes"]
            print(
                f"{name:12} {megabytes:7.1f} {documents:10,} {seconds:8.2f} {documents / seconds:12,.0f} "
                f"{megabytes / seconds:7.2f} {speedup:>9}"
            )


def run(call: Call) -> int:
    """Measure and write."""
    args = build_parser(call.prog).parse_args(call.argv)
    check_record_file(args.json, overwrite=args.overwrite)
    from megatron_crnet.reporting.preprocessing import measure_preprocessing
    from megatron_crnet.utils.environment import provenance

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
    print_table(results)
    if args.json is not None:
        record = {**provenance("preprocessing", call.words), "workers": args.workers, "rows": results}
        write_record(args.json, record)
    return 0
