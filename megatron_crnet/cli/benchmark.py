"""Measure training steps of several configurations, interleaved, so that ratios hold on a busy machine.

    %(prog)s --config examples/quickstart.yaml --sweep variants --sweep recompute --json FILE
    %(prog)s --config examples/quickstart.yaml --processes 4 --sweep strong --sweep layouts
    %(prog)s --config examples/quickstart.yaml --row 'narrow: --model.rank 24' --row 'two x2:'

Any --section.field value holds for all rows. Each row has processes of its own, which run real training steps on random
tokens; a repeat runs one step of each row in a drawn order. Tokens/s are of the median step; `speed` is the median,
over repeats, of tokens/s in units of the sweep's first row, by the clock and by CPU time. MFU is the share of the
device's peak that the model's operations take (recomputation is not counted). Peak memory is that of the fullest rank:
on GPUs the allocator's, on CPUs of all tensors that are alive.
Ctrl-C ends the run with what was measured so far (status 75).
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from typing import Any

from megatron_crnet.cli.main import Call
from megatron_crnet.config.loading import ConfigParser
from megatron_crnet.config.schema import Config
from megatron_crnet.distributed.launcher import read_launch
from megatron_crnet.reporting.benchmark_rows import SWEEPS, Row, parse_row, sweep_rows
from megatron_crnet.utils.errors import require, require_positive
from megatron_crnet.utils.record_file import add_record_options, check_record_file, report_record
from megatron_crnet.utils.signals import INTERRUPTED, Interruption

COLUMNS: tuple[str, ...] = (
    "row",
    "ranks",
    "parameters",
    "ms/step",
    "spread",
    "tokens/s",
    "speed",
    "by CPU time",
    "MFU",
)
BITS = ("losses", "grad_norms")
COLUMNS += ("MFU, whole attention", "peak memory, MiB")


def build_parser(prog: str) -> ConfigParser:
    """The options."""
    parser = ConfigParser(prog=prog, description=__doc__, needs_model=True)
    parser.add_argument("--sweep", action="append", choices=[*SWEEPS], default=[], help="predefined rows; may repeat")
    parser.add_argument("--row", action="append", default=[], help="'NAME: OPTIONS' or 'NAME xPROCESSES: OPTIONS'")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="ranks of a row, and the most of strong and weak (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=10, help="measured steps of each row (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of each row before them (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of rows (default: %(default)s)")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="of one device; without it the data sheet of a GPU that is known, else matrix products measure it",
    )
    parser.add_argument("--alone", action="store_true", help="one row after another, if they do not fit the device")
    parser.add_argument(
        "--no-counts",
        action="store_true",
        help="rows of one rank: do not count operations, which takes a slow step of each row",
    )
    parser.add_argument(
        "--same-bits", action="store_true", help="fail unless losses and gradients' norms of all rows are equal"
    )
    add_record_options(parser)
    return parser


def rows_of(args: argparse.Namespace, config: Config) -> list[Row]:
    """All rows that the command line asks for."""
    require_positive("benchmark", processes=args.processes)
    rows = [row for sweep in dict.fromkeys(args.sweep) for row in sweep_rows(sweep, config, args.processes)]
    rows += [parse_row(text) for text in args.row]
    return rows or [Row("rows", config.model.variant, args.processes)]


def tables(record: dict[str, Any]) -> str:
    """The figures, a table for each sweep, and below what is missing in them."""
    import pandas as pd

    from megatron_crnet.reporting.page import Table
    from megatron_crnet.reporting.scaling_report import row_cells

    peak = f"{record['peak_flops'] / 1e12:.3g} TFLOP/s per device ({record['peak_source']})"
    machine = record["machine"]
    load = f"load {machine['load_average']} to {machine['load_average_at_end']} on {machine['cores']} cores"
    lines = [f"{record['device']}, {record['plan']['repeats']} repeats, {load}", f"peak {peak}"]
    for sweep, found in itertools.groupby(record["rows"], lambda row: row["sweep"]):
        rows = list(found)
        lines += ["", sweep, Table(row_cells(pd.DataFrame(rows), COLUMNS)).markdown()]
        lines += [f"{row['name']}: {_missing(row)}" for row in rows if row["error"] or "median_s" not in row]
    return "\n".join(lines)


def _missing(row: dict[str, Any]) -> str:
    if "median_s" in row:
        return f"only {len(row['seconds'])} repeats: {row['error']}"
    return f"not measured: {row['error'] or 'the run was stopped before'}"


def run(call: Call) -> int:
    """Measure and write; returns the exit status."""
    args, config = build_parser(call.prog).read(call.argv)
    rows = rows_of(args, config)
    several = next((row for row in rows if row.processes > 1), None)
    require(
        not args.no_counts or several is None,
        f"--no-counts leaves out the traffic between ranks, and row {several.name if several else ''} has several: "
        "leave it out",
    )
    started = read_launch().world_size
    require(
        "RANK" not in os.environ and started == 1,
        f"{f'{started} processes were started' if started > 1 else 'RANK is set'}, but this tool starts its own "
        "processes: start it without a launcher",
    )
    check_record_file(args.json, overwrite=args.overwrite)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes, which are not there yet
    from megatron_crnet.reporting.benchmark import BenchmarkPlan, measure
    from megatron_crnet.utils.environment import command_line

    peak = None if args.peak_tflops is None else args.peak_tflops * 1e12
    plan = BenchmarkPlan(args.repeats, args.warm_up, args.threads, args.seed, peak, args.alone, not args.no_counts)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with Interruption() as interruption:
        interruption.arm()
        record = measure(rows, args.configuration, plan, say, lambda: interruption.received is not None)
    record = {"kind": record.pop("kind"), "command": command_line(call.words), **record}
    report_record(args.json, record, tables(record))
    if interruption.received is not None:
        say(f"stopped by {interruption.received.name}: the table holds what was measured so far")
        return INTERRUPTED
    measured = [row for row in record["rows"] if "median_s" in row]
    if not args.same_bits or not measured:
        return 0 if measured else 1
    other = [row["name"] for row in measured if [row[k] for k in BITS] != [measured[0][k] for k in BITS]]
    say(f"other bits than {measured[0]['name']}: {', '.join(other)}" if other else "all rows have the same bits")
    return 1 if other or len(measured) < len(record["rows"]) else 0
