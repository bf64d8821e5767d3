"""Pre-train CR-Net, or resume a run: give a YAML file and override any field as --section.field VALUE.

    %(prog)s --config examples/quickstart.yaml --training.train_steps 100
    %(prog)s --config examples/llama2_7b.yaml --dry-run
    crnet launch --nproc_per_node=2 train --config examples/quickstart.yaml --training.micro_batch_size 4

Exit status: 0 done, 75 stopped by a signal with the state saved (the same command resumes), 2 a mistake in
configuration or data, 3 a loss that is not finite or a spike, 4 another rank died or stalled, 1 any other error.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from megatron_crnet.cli.main import Call, run_cli
from megatron_crnet.utils.errors import require
from megatron_crnet.utils.signals import INTERRUPTED, Interruption

if TYPE_CHECKING:
    from megatron_crnet.config.loading import ConfigParser


def build_parser(prog: str) -> ConfigParser:
    """The options."""
    from megatron_crnet.config.loading import ConfigParser

    parser = ConfigParser(lists_fields=True, prog=prog, description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    return parser


def run(call: Call) -> int:
    """Train; returns the exit status."""
    with Interruption() as interruption:  # before anything that takes time, so that Ctrl-C is always one line
        return run_cli(lambda: _train(call, interruption))  # inside: a launcher's signal must not cut off the error


def _train(call: Call, interruption: Interruption) -> int:
    from megatron_crnet.distributed.launcher import keep_launch_order, read_launch, take_local_rank

    require(bool(call.argv), "no configuration is given: add --config FILE, such as examples/quickstart.yaml")
    options, config = build_parser(call.prog).read(take_local_rank(call.argv))
    launch = read_launch(dry_run=options.dry_run)
    if launch.remark:
        print(launch.remark, file=sys.stderr)
    keep_launch_order(config.parallel.tensor_model_parallel_size)
    # libraries that take seconds to import come after everything that can be refused at once
    from megatron_crnet.distributed import cpu_backend

    cpu_backend.install()
    if options.dry_run:
        from megatron_crnet.planning.tables import dry_run_report

        report = dry_run_report(config, launch.world_size)
        if launch.rank == 0:
            print(report)
        return 0
    from megatron_crnet.training.trainer import run_training

    return 0 if run_training(config, interruption=interruption).complete else INTERRUPTED
