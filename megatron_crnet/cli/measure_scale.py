"""Count what grows with the number of ranks: a few steps of the real trainer on N processes of this host, over gloo.

    %(prog)s --ranks 64 --config examples/quickstart.yaml --training.micro_batch_size 1 \\
        --training.global_batch_size 64 --logging.output_dir /tmp/scale

Counts, of each process: open sockets after a checkpoint, collective calls of a step and of these the host's own (over
all ranks, on the host, beside the model's), bytes read of the data's token files, validation samples drawn and other
bytes read from the start to the first step. `train_steps` is 4. Needs about 0.2 GiB of memory per rank.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from typing import TYPE_CHECKING

from megatron_crnet.cli.main import Call
from megatron_crnet.config.loading import ConfigParser
from megatron_crnet.config.options import positive_integer
from megatron_crnet.utils.record_file import add_record_options, check_record_file, report_record
from megatron_crnet.utils.tables import table

if TYPE_CHECKING:
    from megatron_crnet.reporting.scale import Figures

FIGURES = {
    "sockets": "open sockets",
    "collectives": "collective calls of a step",
    "world_calls": "of these over all ranks",
    "token_bytes": "bytes read of token files",
    "samples": "validation samples drawn at start",
    "other_bytes": "other bytes read at start",
}


def build_parser(prog: str) -> ConfigParser:
    """The options."""
    parser = ConfigParser(prog=prog, description=__doc__, needs_model=True)
    for name, default, text in (("--ranks", 8, "processes"), ("--port", 29511, "where they meet")):
        count = partial(positive_integer, name)
        parser.add_argument(name, type=count, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    add_record_options(parser)
    return parser


def figures(found: list[Figures]) -> str:
    """Those of rank 0, the median and the largest of the others."""
    rows = []
    for key, name in FIGURES.items():
        first, *others = [counts[key] for counts in found]
        others = others or [first]
        rows.append((name, f"{first:,}", f"{statistics.median_low(others):,}", f"{max(others):,}"))
    return table((f"of each of {len(found)} ranks", "rank 0", "median of the others", "largest"), rows)


def run(call: Call) -> int:
    """Count and print; returns the exit status."""
    options, _ = build_parser(call.prog).read(call.argv)
    check_record_file(options.json, overwrite=options.overwrite)
    from megatron_crnet.reporting.scale import STEPS, measure_scale
    from megatron_crnet.utils.environment import run_metadata

    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "training.train_steps": STEPS,
            "training.eval_interval": 0,
            "checkpoint.save_interval": 2,
            "logging.log_interval": 1,
            "logging.sample_tokens": 0,
            "optimizer.lr_warmup_steps": 1,
            "logging.output_dir": folder,
            "checkpoint.dir": "null",
        }
        words = [*options.configuration, *(f"--{name}={value}" for name, value in changes.items())]
        found = measure_scale(options.ranks, words, options.port)
    report_record(options.json, {**run_metadata("scale", call.words), "ranks": found}, figures(found))
    return 0
