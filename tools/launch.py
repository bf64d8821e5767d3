#!/usr/bin/env python3
"""Start ranks as torchrun does, with two differences that jobs which are stopped and continued need.

    python tools/launch.py --nproc_per_node=8 pretrain_crnet.py --config examples/llama2_7b.yaml

Takes torchrun's options but --max_restarts. The exit status is that of the first rank that failed (torchrun's own is
always 1). SIGTERM, SIGUSR1 and Ctrl-C are passed on to the ranks, which save and end themselves; torchrun would kill
them after 30 seconds.
"""

from __future__ import annotations

from megatron_crnet.utils.errors import ctrl_c_is_one_line

if __name__ == "__main__":
    ctrl_c_is_one_line()  # during the imports below as well

import logging
import os
import signal
import sys
from contextlib import suppress

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from megatron_crnet.utils.signals import INTERRUPTED, SignalListener
from megatron_crnet.utils.versions import version_line

OWN_SIGNALS = "SIGHUP,SIGQUIT"
"""At these the agent itself ends its ranks."""


class Warnings:
    """Passes signals on to the ranks; before there are any, a signal ends this agent.

    Taken by a thread, because the agent's main thread may wait for other nodes where Python runs no handler.
    """

    def __init__(self) -> None:
        self.passed: set[int] = set()
        self._listener = SignalListener(self._pass_on)

    def _pass_on(self, number: signal.Signals) -> None:
        ranks = psutil.Process().children()
        if not ranks:
            print(f"{number.name} before a rank was started: nothing to save", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
        self.passed.add(number)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)


def status_of(error: ChildFailedError, passed: set[int]) -> int:
    """The exit status of the first rank that failed.

    Args:
        passed: signals that were passed on: a rank that had not yet learnt to take one has lost nothing by it.
    """
    rank, failure = error.get_first_failure()
    code = int(failure.exitcode)
    if code < 0:
        print(f"rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
        return INTERRUPTED if -code in passed else 128 - code
    print(f"rank {rank} ended with status {code}", file=sys.stderr, flush=True)
    return code


def main(argv: list[str]) -> int:
    """Run torchrun's agent on this node; returns the exit status."""
    if argv == ["--version"]:
        print(version_line())
        return 0
    arguments = parse_args(argv)
    if arguments.max_restarts:
        print(
            f"error: --max_restarts is {arguments.max_restarts}, but a rank that has saved and ended must not be "
            "started again here: leave it out; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 2
    arguments.signals_to_handle = OWN_SIGNALS
    # which process failed and who was ended because of it: the ranks say so themselves, and `status_of`
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    warnings = Warnings()
    try:
        run(arguments)
    except ChildFailedError as error:
        return status_of(error, warnings.passed)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
