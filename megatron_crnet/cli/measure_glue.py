"""Count what a layer's operations other than matrix products and attention read and write, and its launches.

    %(prog)s --config examples/llama2_7b.yaml --training.dtype bf16
    %(prog)s --config examples/llama2_1b.yaml --variants crnet low_rank --json

A layer in the middle of the model, forward and backward of one micro-batch, one rank without parallelism, on tensors
without memory. What is compiled on CUDA as one region counts its inputs, its outputs and one launch. The residual
counts with the products that take it along, as those in bf16 do on Hopper GPUs (H100, H200).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_crnet.cli.main import Call
from megatron_crnet.config.loading import ConfigParser
from megatron_crnet.config.schema import VARIANTS
from megatron_crnet.utils.record_file import add_record_options, check_record_file, report_record
from megatron_crnet.utils.tables import table

if TYPE_CHECKING:
    from megatron_crnet.config.schema import Config


def build_parser(prog: str) -> ConfigParser:
    """The options."""
    parser = ConfigParser(prog=prog, description=__doc__, needs_model=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="which to count (default: all)")
    add_record_options(parser)
    return parser


def figures(config: Config, rows: list[dict[str, Any]]) -> str:
    """One line per variant, then one per region of each pass."""
    title = (
        f"one layer, h = {config.model.hidden_size}, ffn = {config.model.ffn_hidden_size}, "
        f"{config.training.micro_batch_size} x {config.training.seq_length} tokens, {config.training.dtype}; "
        "bytes per token without products and attention\n\n"
    )
    summary = [(row["variant"], f"{row['bytes_per_token_layer']:,.0f}", str(row["launches_per_layer"])) for row in rows]
    regions = [
        (row["variant"], name, region, f"{counts['bytes']:,.0f}", str(counts["launches"]))
        for row in rows
        for name in ("forward", "backward")
        for region, counts in row[name].items()
    ]
    return (
        title
        + table(("variant", "bytes", "launches"), summary)
        + "\n\n"
        + table(("variant", "pass", "region", "bytes", "launches"), regions)
    )


def run(call: Call) -> int:
    """Count, print and write."""
    options, config = build_parser(call.prog).read(call.argv)
    check_record_file(options.json, overwrite=options.overwrite)
    from megatron_crnet.distributed import cpu_backend

    cpu_backend.install()
    from megatron_crnet.distributed.process_groups import shutdown_parallel
    from megatron_crnet.planning.glue import measure_glue
    from megatron_crnet.utils.environment import run_metadata

    rows = measure_glue(config, options.variants or VARIANTS)
    shutdown_parallel()
    report_record(options.json, {**run_metadata("glue", call.words), "rows": rows}, figures(config, rows))
    return 0
