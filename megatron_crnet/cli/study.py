"""Train a grid of configurations, resumable, and compare their validation losses.

    %(prog)s examples/studies/recipe.yaml --processes 2
    %(prog)s examples/studies/recipe.yaml --show

The YAML file names a configuration (`base`), fields that differ from it (`options`), `axes` with their values, `seeds`
and a budget (`tokens` per run). An axis with `extend: FACTOR` gets further values, for all variants alike, until the
best value of each is inside. Each finished run is a line of results.jsonl in the folder of the study; a run that
diverges or fails is a line with the reason. losses.png shows the losses, curves.png those of runs that validated on
their way. The same command goes on with what is missing.

Exit status: 0 done, 75 stopped by a signal, 2 a mistake in the file or results of another study, 1 no run has a loss.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_crnet.cli.main import Call
from megatron_crnet.config.options import ToolParser
from megatron_crnet.utils.errors import DataError, cannot_be_written, require, require_positive
from megatron_crnet.utils.signals import INTERRUPTED, Interruption


def build_parser(prog: str) -> ToolParser:
    """The options."""
    parser = ToolParser(prog=prog, description=__doc__)
    parser.add_argument("study", type=Path, metavar="FILE", help="YAML file of the study")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="of the results (default: runs/studies/NAME)")
    parser.add_argument("--processes", type=int, default=1, help="runs at once (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: %(default)s)")
    parser.add_argument("--retry", action="store_true", help="repeat runs that failed (not those that diverged)")
    parser.add_argument("--show", action="store_true", help="only print the table and draw the plots of what is done")
    return parser


def run(call: Call) -> int:
    """Train what is missing, print the table and draw the plots; returns the exit status."""
    args = build_parser(call.prog).parse_args(call.argv)
    require_positive("study", processes=args.processes, threads=args.threads)
    require("RANK" not in os.environ, "RANK is set, but a study starts its own processes: start it without a launcher")
    output = args.output or Path("runs/studies") / args.study.stem
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes, which are not there yet
    from megatron_crnet.reporting.study import RESULTS, StudyRunner, extended, read_rows
    from megatron_crnet.reporting.study_grid import read_study
    from megatron_crnet.reporting.study_table import plot_curves, plot_study, study_table

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    study = given = read_study(args.study, output)
    if args.show:
        rows = read_rows(study)
        while (longer := extended(study, rows, given)) != study:
            study = longer
        stopped = None
    else:
        with Interruption() as interruption:
            interruption.arm()
            runner = StudyRunner(
                study, args.processes, args.threads, args.retry, say, lambda: interruption.received is not None
            )
            study, rows = runner.run()
            stopped = interruption.received
    if not rows and stopped is None:
        raise DataError(f"{output / RESULTS} holds no finished run: start the study without --show")
    if rows:
        print(study_table(study, rows))
        try:
            plot_study(study, rows, output / "losses.png")
            plot_curves(study, rows, output / "curves.png")
            say(f"{output} holds {RESULTS}, pictures and the runs")
        except OSError as error:
            say(f"warning: {cannot_be_written(f'pictures in {output}', error)}")
    if stopped is not None:
        say(f"stopped by {stopped.name}: the same command goes on")
        return INTERRUPTED
    return 0 if any(row["status"] == "complete" for row in rows.values()) else 1
