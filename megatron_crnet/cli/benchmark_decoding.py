"""Tokens per second of decoding, with and without the key-value cache, for CR-Net and a plain LLaMA of the same shape.

    %(prog)s --config examples/llama2_60m.yaml --prompt-tokens 32 --new-tokens 64

Random weights, greedy, always all new tokens. One repeat runs every row once, in turn, so that a busy machine slows all
alike; what full rank is compared by is the median of the ratios within repeats. CPU time beside the clock's tells how
busy the machine was. A row's time holds the pass over the prompt.
"""

from __future__ import annotations

from typing import Any

from megatron_crnet.cli.main import Call
from megatron_crnet.config.options import ToolParser
from megatron_crnet.config.schema import VARIANTS
from megatron_crnet.utils.errors import require_positive
from megatron_crnet.utils.record_file import add_record_options, check_record_file, report_record
from megatron_crnet.utils.tables import table

EXPORTED = tuple(variant for variant in VARIANTS if variant != "relora")
"""Variants of exports: relora is merged into full_rank."""


def build_parser(prog: str) -> ToolParser:
    """The options."""
    parser = ToolParser(prog=prog, description=__doc__)
    parser.add_argument("--config", required=True, help="YAML whose model section gives the shape")
    parser.add_argument("--variants", nargs="+", choices=EXPORTED, default=["crnet", "full_rank"])
    parser.add_argument("--batch-size", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="after one to warm up (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    add_record_options(parser)
    return parser


def figures(rows: list[dict[str, Any]]) -> str:
    """The figures as a table."""
    from megatron_crnet.reporting.decoding import of_full_rank

    header = ("variant", "cache", "parameters", "tokens/s", "spread", "tokens/s of CPU", "spread", "of full rank")
    form = "{parameters:.1f}M {tokens_per_s:.1f} {spread:.0%} {tokens_per_cpu_s:.1f} {cpu_spread:.0%}"
    millions = [{**row, "parameters": row["parameters"] / 1e6} for row in rows]
    cells = [
        [row["variant"], "yes" if row["cache"] else "no", *form.format(**row).split(), of_full_rank(row, rows)]
        for row in millions
    ]
    return table(header, cells, text_columns=2)


def run(call: Call) -> int:
    """Measure and write."""
    args = build_parser(call.prog).parse_args(call.argv)
    check_record_file(args.json, overwrite=args.overwrite)
    if args.threads is not None:
        require_positive("benchmark", threads=args.threads)
    import torch

    from megatron_crnet.config.loading import load_config
    from megatron_crnet.reporting.decoding import measure_decoding
    from megatron_crnet.utils.environment import run_metadata

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows = measure_decoding(
        load_config(args.config),
        args.variants,
        batch_size=args.batch_size,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        dtype=args.dtype,
    )
    about = {name: str(value) for name, value in vars(args).items()}
    record = {**run_metadata("decoding", call.words), "arguments": about, "rows": rows}
    report_record(args.json, record, figures(rows))
    return 0
