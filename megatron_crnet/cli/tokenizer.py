"""Train a SentencePiece tokenizer (T5's special ids, bytes as fallback, exact round trips) on a sample of a corpus.

    %(prog)s corpus/train.jsonl --output corpus/tokenizer --vocab-size 4096

All of the text is read once, so a part of a large corpus is enough.
"""

from __future__ import annotations

import sys

from megatron_crnet.cli.main import Call
from megatron_crnet.config.options import ToolParser
from megatron_crnet.utils.environment import available_cpus


def build_parser(prog: str) -> ToolParser:
    """The options."""
    parser = ToolParser(prog=prog, description=__doc__)
    parser.add_argument(
        "input",
        nargs="+",
        help="files or folders, as for crnet preprocess",
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.model")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=32000,
        help="pieces, or as many as the text supports (default: %(default)s)",
    )
    parser.add_argument("--text-key", default="text", help="as for crnet preprocess (default: text)")
    parser.add_argument("--format", choices=("jsonl", "text", "parquet"), help="as for crnet preprocess")
    parser.add_argument(
        "--sample-bytes", type=int, help="how much text to train on, drawn from all (default: 512 for each piece)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=available_cpus(),
        help="another number may give slightly other scores (default: one for each CPU, here %(default)s)",
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first line that cannot be decoded")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


def run(call: Call) -> int:
    """Train and say what was left out."""
    args = build_parser(call.prog).parse_args(call.argv)
    from megatron_crnet.data.corpus import iter_documents
    from megatron_crnet.data.corpus_files import check_outside
    from megatron_crnet.data.corpus_stats import CorpusStats
    from megatron_crnet.data.tokenizer import load_tokenizer
    from megatron_crnet.data.train_tokenizer import train_sentencepiece
    from megatron_crnet.utils.files import output_files
    from megatron_crnet.utils.progress import ProgressPrinter

    stats = CorpusStats()
    check_outside(output_files(args.output, ".model"), args.input)
    with ProgressPrinter() as progress:
        model = train_sentencepiece(
            iter_documents(args.input, args.text_key, args.strict, stats, args.format, progress),
            args.output,
            args.vocab_size,
            num_threads=args.threads,
            sample_bytes=args.sample_bytes,
            overwrite=args.overwrite,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    size = load_tokenizer("sentencepiece", str(model)).vocab_size
    more = f", the most that the text supports, not {args.vocab_size}: give more text for more"
    print(f"{model}: {size} pieces{more if size < args.vocab_size else ''}")
    for line in stats.summary():
        print(line)
    return 0
