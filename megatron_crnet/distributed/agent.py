"""torchrun's agent, whose status is the ranks' own and who passes signals on to them."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from megatron_crnet.utils.signals import INTERRUPTED, SignalListener

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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """torchrun's options."""
    arguments: argparse.Namespace = parse_args([*argv])
    return arguments


def run_agent(arguments: argparse.Namespace) -> int:
    """Start the ranks and wait for them. Returns the exit status."""
    arguments.signals_to_handle = OWN_SIGNALS
    # which process failed and who was ended because of it: the ranks say so themselves, and `status_of`
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    warnings = Warnings()
    try:
        run(arguments)
    except ChildFailedError as error:
        return status_of(error, warnings.passed)
    return 0
