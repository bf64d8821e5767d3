"""Count what each recomputation strategy keeps, holds at its peak and computes, on the layers of a configuration.

    %(prog)s --config examples/llama2_7b.yaml --training.micro_batch_size 1
    %(prog)s --config examples/llama2_60m.yaml --resident

One micro-batch, one rank without parallelism, the decoder's layers alone.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron_crnet.cli.main import Call
from megatron_crnet.config.loading import ConfigParser
from megatron_crnet.config.options import positive_integer
from megatron_crnet.config.recompute_section import STRATEGIES
from megatron_crnet.config.schema import Config
from megatron_crnet.utils.errors import require
from megatron_crnet.utils.record_file import add_record_options, check_record_file, report_record
from megatron_crnet.utils.tables import table


def build_parser(prog: str) -> ConfigParser:
    """The options."""
    parser = ConfigParser(prog=prog, description=__doc__, needs_model=True)
    parser.add_argument(
        "--tensors",
        choices=("fake", "real"),
        default="fake",
        help="fake: shapes without memory, so any size fits (the default); real runs the pass",
    )
    parser.add_argument(
        "--segments",
        type=partial(positive_integer, "--segments"),
        metavar="N",
        help="also measure replay and full with segments of N layers",
    )
    parser.add_argument(
        "--resident",
        action="store_true",
        help="run real training steps, one process for each strategy, and report peak resident memory (of the host; on "
        "CPUs that is where activations are)",
    )
    add_record_options(parser)
    return parser


def measure(config: Config, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each strategy."""
    from megatron_crnet.distributed.process_groups import shutdown_parallel
    from megatron_crnet.planning.measurements import measure_strategies

    found = measure_strategies(config, fake=options.tensors == "fake", segment_length=options.segments)
    shutdown_parallel()
    return found


def resident(configuration: Sequence[str], config: Config) -> list[dict[str, Any]]:
    """Peak resident memory of a process that trains two steps of one micro-batch, for each strategy."""
    from megatron_crnet.config.loading import read_config
    from megatron_crnet.reporting.rank_group import RankGroup
    from megatron_crnet.reporting.training_rank import resident_rank

    found = []
    for strategy in STRATEGIES:
        changes = {"recompute.strategy": strategy, "training.global_batch_size": config.training.micro_batch_size}
        words = [*configuration, *(f"--{name}={value}" for name, value in changes.items())]
        group = RankGroup(resident_rank, read_config(words), threads=None)
        found += group.answers()
        group.close()
    return found


def figures(config: Config, found: list[dict[str, Any]]) -> str:
    """The figures as a table, in MiB and as shares of no recomputation."""
    none, size = found[0], 2**20
    title = (
        f"{config.model.num_layers} layers, h = {config.model.hidden_size}, {config.training.micro_batch_size} x "
        f"{config.training.seq_length} tokens, {config.training.dtype}; MiB and GFLOP\n\n"
    )
    header = ("strategy", "kept", "formula", "transient", "peak", "of none", "GFLOP", "extra", "segments")
    return title + table(
        header,
        [
            (
                m["name"],
                *(f"{m[key] / size:,.1f}" for key in ("kept", "formula", "transient", "peak")),
                f"{m['peak'] / none['peak']:.3f}",
                f"{m['flops'] / 1e9:,.1f}",
                f"{m['flops'] / none['flops'] - 1:.1%}",
                _segments(m["segments"]),
            )
            for m in found
        ],
    )


def _segments(lengths: list[int]) -> str:
    """Layers of each segment, equal ones together: 8 x 4, 2."""
    return ", ".join(f"{len(list(same))} x {n}" for n, same in itertools.groupby(lengths)).replace("1 x ", "") or "-"


def resident_figures(found: list[dict[str, Any]]) -> str:
    """Peak resident memory as a table."""
    none, kib = found[0]["peak_kib"] - found[0]["before_kib"], 1024
    rows = [
        (
            m["name"],
            f"{m['before_kib'] / kib:,.0f}",
            f"{m['peak_kib'] / kib:,.0f}",
            f"{(m['peak_kib'] - m['before_kib']) / none:.3f}",
        )
        for m in found
    ]
    return table(("strategy", "before training, MiB", "peak, MiB", "peak - before, of none"), rows)


def run(call: Call) -> int:
    """Count, print and write."""
    options, config = build_parser(call.prog).read(call.argv)
    require(
        config.parallel.tensor_model_parallel_size
        * config.parallel.pipeline_model_parallel_size
        * config.parallel.expert_model_parallel_size
        == 1,
        "the configuration asks for tensor, pipeline or expert parallelism, but this command counts one rank without: "
        "set these sizes to 1",
    )
    check_record_file(options.json, overwrite=options.overwrite)
    from megatron_crnet.distributed import cpu_backend

    cpu_backend.install()
    from megatron_crnet.utils.environment import run_metadata

    found = resident(options.configuration, config) if options.resident else measure(config, options)
    text = resident_figures(found) if options.resident else figures(config, found)
    kind = "resident memory" if options.resident else "recompute"
    report_record(options.json, {**run_metadata(kind, call.words), "rows": found}, text)
    return 0
