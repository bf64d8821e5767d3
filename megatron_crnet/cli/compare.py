"""Print the final losses of runs side by side, from their metrics.jsonl and config.yaml.

    %(prog)s runs/compare/*

What is damaged is named, and the rest is shown. Exit status: 0 a run was shown, 2 none could be read.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_crnet.cli.main import Call
from megatron_crnet.config.options import ToolParser
from megatron_crnet.utils.errors import DataError

SHORT = {"parameters": "weights", "training loss": "training", "validation loss": "valid.", "perplexity": "ppl"}
"""Columns of losses in a terminal."""


def build_parser(prog: str) -> ToolParser:
    """The options."""
    parser = ToolParser(prog=prog, description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    return parser


def run(call: Call) -> int:
    """Print the table; the best validation loss comes first."""
    folders = build_parser(call.prog).parse_args(call.argv).runs
    from megatron_crnet.reporting.inputs import METRICS, ReportInputs, read_run
    from megatron_crnet.reporting.scaling_report import run_row
    from megatron_crnet.utils.tables import table

    inputs = ReportInputs()
    for folder in folders:
        read_run(folder / METRICS, inputs)
    for problem in inputs.say():
        print(f"warning: {problem}", file=sys.stderr)
    if not inputs.runs:
        raise DataError(f"none of the {len(folders)} runs could be read: give folders that hold a {METRICS}")
    rows = [
        {SHORT.get(k, k): v for k, v in run_row(run).items() if k != "ranks"}
        for run in sorted(inputs.runs, key=lambda run: run.last("validation_loss") or float("inf"))
    ]
    print(table([*rows[0]], [[*row.values()] for row in rows], text_columns=2))
    return 0
