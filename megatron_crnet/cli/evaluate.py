"""Loss and perplexity of a trained model, an export or a checkpoint, over text or token files.

    %(prog)s --model exports/quickstart --data data/quickstart/valid
    %(prog)s --model runs/quickstart --text my/text
    %(prog)s --model runs/quickstart --validation-of runs/quickstart/config.yaml

`loss` is in nats per token, the mean over all tokens. `galore_compatible_loss` is what the scripts derived from
GaLore's report: the sum of the batches' mean losses divided by their number plus one. It depends on --batch-size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from megatron_crnet.cli.main import Call
from megatron_crnet.config.options import ToolParser
from megatron_crnet.utils.errors import require, require_positive
from megatron_crnet.utils.progress import CountPrinter, ProgressPrinter


def build_parser(prog: str) -> ToolParser:
    """The options."""
    parser = ToolParser(prog=prog, description=__doc__)
    parser.add_argument("--model", required=True, help="an export, a checkpoint, or the folder of a run")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="PREFIX", help="PREFIX.bin and PREFIX.idx")
    source.add_argument("--text", help="a file or folder, as for crnet preprocess")
    source.add_argument("--validation-of", metavar="CONFIG", help="the samples that a run with this YAML validates on")
    parser.add_argument("--seq-length", type=int, help="tokens in a row (default: max_position_embeddings)")
    parser.add_argument("--allow-longer", action="store_true", help="rows longer than the model was trained for")
    parser.add_argument("--batch-size", type=int, default=8, help="rows in a forward pass (default: %(default)s)")
    parser.add_argument(
        "--sample-format",
        choices=("packed", "padded"),
        help="packed: documents joined and cut, every token once; padded: one document per row, cut (default: packed)",
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
    return parser


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


def run(call: Call) -> int:
    """Print the figures."""
    args = build_parser(call.prog).parse_args(call.argv)
    check(args)
    from megatron_crnet.config.loading import load_config
    from megatron_crnet.data.corpus_stats import CorpusStats
    from megatron_crnet.distributed.cpu_backend import quiet_libraries
    from megatron_crnet.hf.evaluate import evaluate_rows, rows_to_evaluate
    from megatron_crnet.hf.generate import open_model

    quiet_libraries()
    opened = open_model(Path(args.model), dtype=args.dtype, tokenizer=args.tokenizer)
    for note in opened.notes:
        print(f"warning: {note}", file=sys.stderr)
    stats = CorpusStats()
    with ProgressPrinter() as progress:
        work = rows_to_evaluate(
            opened,
            data=args.data,
            text=args.text,
            validation_of=load_config(args.validation_of) if args.validation_of else None,
            seq_length=args.seq_length,
            allow_longer=args.allow_longer,
            padded=args.sample_format == "padded",
            reset_attention_mask=args.reset_attention_mask,
            max_tokens=args.max_tokens,
            stats=stats,
            progress=progress,
        )
    for line in stats.summary():
        print(line, file=sys.stderr)
    found = dataclasses.asdict(evaluate_rows(opened.model, work, args.batch_size, CountPrinter("tokens", work.labels)))
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for name, value in found.items():
        print(f"{name:30} {value:,}" if isinstance(value, int) else f"{name:30} {value:.6f}")
    return 0
