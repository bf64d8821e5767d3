"""torchrun's agent with the ranks' own exit status, which forwards signals to them."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

import psutil
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

from megatron_crnet.utils.errors import ConfigError, PeerLostError
from megatron_crnet.utils.signals import INTERRUPTED, SignalListener

OWN_SIGNALS = "SIGHUP,SIGQUIT"
"""Signals on which the agent itself ends its ranks."""


def _forward(number: signal.Signals, forwarded: set[int]) -> None:
    ranks = psutil.Process().children()
    if not ranks:
        print(f"{number.name} before a rank was started: nothing to save", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    forwarded.add(number)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def status_of(error: ChildFailedError, forwarded: set[int], nodes: str) -> int:
    """The exit status of the first rank that failed; one that a forwarded signal ended had no handler for it yet.

    On several nodes SIGABRT is how NCCL ends ranks that have lost a peer of another node, often before the watchdog.
    """
    rank, failure = error.get_first_failure()
    code = int(failure.exitcode)
    if code < 0:
        number = signal.Signals(-code)
        aborts = number == signal.SIGABRT and nodes not in ("1", "1:1")
        why = ", as NCCL does where a peer is lost" if aborts else ""
        print(f"rank {rank} was ended by {number.name}{why}", file=sys.stderr, flush=True)
        if number in forwarded:
            return INTERRUPTED
        return PeerLostError.exit_status if aborts else 128 + number
    print(f"rank {rank} ended with status {code}", file=sys.stderr, flush=True)
    return code


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """torchrun's options."""
    arguments: argparse.Namespace = parse_args([*argv])
    return arguments


def run_agent(arguments: argparse.Namespace) -> int:
    """Start the ranks and wait for them. Returns the exit status.

    Raises:
        ConfigError: the port is taken.
        PeerLostError: the nodes do not find each other.
    """
    arguments.signals_to_handle = OWN_SIGNALS
    # the ranks and `status_of` report which process failed
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    forwarded: set[int] = set()
    # on a thread: the main thread may wait for other nodes where Python runs no handler
    SignalListener(lambda number: _forward(number, forwarded))
    try:
        run(arguments)
    except ChildFailedError as error:
        return status_of(error, forwarded, arguments.nnodes)
    except (dist.DistError, RendezvousError) as error:
        raise _not_met(arguments, error) from error
    return 0


def _not_met(arguments: argparse.Namespace, error: Exception) -> ConfigError | PeerLostError:
    """The error for agents that could not start together."""
    if "EADDRINUSE" in str(error):
        return ConfigError(
            f"port {arguments.master_port} of this host is in use, by another launch perhaps: choose another "
            "--master_port, or --standalone on one node"
        )
    where = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
    reason = str(error).strip().partition("\n")[0]
    return PeerLostError(
        f"the {arguments.nnodes} nodes of this launch did not meet at {where} ({reason}): start all of them with the "
        "same address, which each can resolve and reach, and try again"
    )
