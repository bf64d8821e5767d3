#!/usr/bin/env python3
"""Pre-train CR-Net.

    python pretrain_crnet.py --config examples/quickstart.yaml --training.train_steps 100
    torchrun --nproc_per_node=2 pretrain_crnet.py --config examples/quickstart.yaml --training.micro_batch_size 4

Exit status: 0 done, 75 stopped by a signal with the state saved (the same command goes on), 2 a mistake in
configuration or data, 3 a loss that is not finite or a spike, 4 another rank that died or stands still, 1 all else.
"""

from __future__ import annotations

from megatron_crnet.utils.errors import ctrl_c_is_one_line

if __name__ == "__main__":
    ctrl_c_is_one_line()  # during the imports below as well

import os
import sys
import traceback

from megatron_crnet.distributed.launcher import read_launch, take_local_rank
from megatron_crnet.utils.errors import CrnetError
from megatron_crnet.utils.signals import INTERRUPTED, Interruption


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status."""
    with Interruption() as interruption:  # before anything that takes time, so that Ctrl-C is always one line
        return _run(argv, interruption)


def _run(argv: list[str], interruption: Interruption) -> int:
    from megatron_crnet.config.loading import parse_arguments

    try:
        arguments = parse_arguments(take_local_rank(argv))
        launch = read_launch(dry_run=arguments.dry_run)
        if launch.remark:
            print(launch.remark, file=sys.stderr)
        # libraries that take seconds to import come after everything that can be refused at once
        from megatron_crnet.distributed import cpu_backend

        cpu_backend.install()
        from megatron_crnet.planning.dry_run import dry_run_report

        if arguments.dry_run:
            report = dry_run_report(arguments.config, launch.world_size)
            if launch.rank == 0:
                print(report)
            return 0
        from megatron_crnet.training.trainer import run_training

        return 0 if run_training(arguments.config, interruption=interruption).complete else INTERRUPTED
    except CrnetError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
        return error.exit_status


def run(argv: list[str]) -> None:
    """Run the command line and end this rank's process at once, whatever threads and helpers it still has."""
    try:
        status = main(argv)
    except SystemExit:  # --help, --version
        raise
    except BaseException:
        traceback.print_exc()
        status = 1
    leave(status)


def leave(status: int) -> None:
    """End the process at once: no rank may wait for others, or for a helper that is stuck, on its way out."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run(sys.argv[1:])
