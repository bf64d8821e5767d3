"""Rendezvous: the processes of a run meet in a key-value store that rank 0 or the launcher holds.

PyTorch's own (env://) prints its C++ stack where a name does not resolve, waits for ever for a program that listens
without answering, and does not name missing ranks.
"""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from megatron_crnet.distributed.launcher import LOOPBACK, Launch
from megatron_crnet.distributed.watchdog import REMEDY, ranks_line
from megatron_crnet.utils.errors import ConfigError, PeerLostError, require

RESOLVING_SECONDS = 10.0
"""The name of a node may become known a little after its processes have started."""
LONGEST_PAUSE_SECONDS = 0.5
OUTCOME, COMPLETE = "start", "complete"
_met: dict[Launch, tuple[dist.Store, int]] = {}
"""The store of this process's launch, and how often its ranks have met there. It stays open for the next run of the
same processes: rank 0 must not close it while another rank looks for it."""


def meet(launch: Launch, limit_minutes: float) -> dist.Store:
    """Wait for all ranks of a launch. Returns their store, with keys of this run alone.

    Raises:
        ConfigError, PeerLostError: see `shared_store` and `wait_for_all`.
    """
    store, runs = _met.get(launch) or (shared_store(launch, limit_minutes), 0)
    if launch.world_size > 1:
        _met[launch] = store, runs + 1
        store.set_timeout(timedelta(minutes=limit_minutes))
    store = dist.PrefixStore(f"run {runs}", store)
    wait_for_all(store, launch.rank, launch.world_size, limit_minutes)
    return store


def shared_store(launch: Launch, limit_minutes: float) -> dist.Store:
    """The store of all ranks of this start: torchrun's agent's where it holds one, else rank 0's.

    Raises:
        ConfigError: MASTER_ADDR does not resolve or is another host's, MASTER_PORT is taken.
        PeerLostError: no answer within the limit.
    """
    if launch.world_size == 1:
        return dist.HashStore()
    address, port = launch.address, launch.port
    assert address is not None
    assert port is not None
    _raise_descriptor_limit()
    deadline = time.monotonic() + 60 * limit_minutes
    _resolve(address, min(deadline, time.monotonic() + RESOLVING_SECONDS))
    if launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return _own_store(address, port, launch.world_size, limit_minutes)
    where = f"{address}:{port} (MASTER_ADDR:MASTER_PORT)"
    if not _answers(address, port, deadline):
        raise PeerLostError(
            f"rank 0 or the launcher did not answer at {where} within parallel.distributed_timeout_minutes "
            f"{limit_minutes:g}: {REMEDY}"
        )
    store = _connected(address, port, launch.world_size, deadline)
    if store is None:
        raise PeerLostError(
            f"what answers at {where} is not the store of these ranks: another program may use the port; set "
            "MASTER_PORT to a free one"
        )
    # an agent that starts its ranks again keeps its store, with the keys of the attempt before
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return store if attempt == "0" else dist.PrefixStore(f"attempt {attempt}", store)


def _raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard one: rank 0 has a connection to every rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _resolve(address: str, deadline: float) -> None:
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"MASTER_ADDR {address} does not resolve ({getattr(error, 'strerror', None) or error}): set it to "
                    "the name or address of the node of rank 0"
                ) from error
        time.sleep(0.5)


def _own_store(address: str, port: int, world_size: int, limit_minutes: float) -> dist.Store:
    try:
        store = _tcp_store(LOOPBACK, port, world_size, True, timedelta(minutes=limit_minutes))
    except dist.DistError as error:
        raise ConfigError(
            f"MASTER_PORT {port} cannot be opened on {socket.gethostname()} ({_reason(error)}): set MASTER_PORT "
            "to a free port"
        ) from error
    if not _answers(address, port, time.monotonic() + min(RESOLVING_SECONDS, 60 * limit_minutes)):
        raise ConfigError(
            f"MASTER_ADDR {address} does not lead to {socket.gethostname()}, where rank 0 is: set it to the "
            "name or address of this node"
        )
    return store


def _tcp_store(address: str, port: int, world_size: int, holds: bool, limit: timedelta) -> dist.Store:
    # by itself it would wait for the others, and not name those that are missing
    return dist.TCPStore(address, port, world_size, holds, limit, wait_for_workers=False, multi_tenant=True)


def _reason(error: dist.DistError) -> str:
    text = str(error)
    return "it is in use" if "EADDRINUSE" in text else text.splitlines()[0].partition("message: ")[2] or text[:100]


def _answers(address: str, port: int, deadline: float) -> bool:
    """Whether connections are accepted before the deadline."""
    while (left := deadline - time.monotonic()) > 0:
        with suppress(OSError), socket.create_connection((address, port), timeout=min(left, RESOLVING_SECONDS)):
            return True
        time.sleep(min(left, 0.2))
    return False


def _connected(address: str, port: int, world_size: int, deadline: float) -> dist.Store | None:
    """The store; None if another program listens there, which may keep the thread that asks for ever."""
    found: list[dist.Store] = []
    limit = timedelta(seconds=max(deadline - time.monotonic(), 1.0))

    def connect() -> None:
        with suppress(RuntimeError):
            found.append(_tcp_store(address, port, world_size, False, limit))

    thread = threading.Thread(target=connect, daemon=True, name="store")
    thread.start()
    thread.join(limit.total_seconds())
    return found[0] if found else None


def wait_for_all(store: dist.Store, rank: int, world_size: int, limit_minutes: float) -> None:
    """Note this rank's arrival in the store and wait for that of all others.

    Raises:
        ConfigError: two processes have the same rank.
        PeerLostError: names the ranks that have not arrived.
    """
    deadline, pause = time.monotonic() + 60 * limit_minutes, 0.01
    try:
        if store.add(f"arrived/{rank}", 1) > 1:
            store.set(OUTCOME, f"two processes have RANK {rank}")
        # one key to look for, not one of every rank
        elif store.add("arrived", 1) == world_size:
            store.set(OUTCOME, COMPLETE)
        while not store.check([OUTCOME]):
            if time.monotonic() >= deadline:
                missing = [other for other in range(world_size) if not store.check([f"arrived/{other}"])]
                raise PeerLostError(
                    f"{ranks_line(missing)} of {world_size} did not arrive within "
                    f"parallel.distributed_timeout_minutes {limit_minutes:g}: {REMEDY}"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS, max(deadline - time.monotonic(), 0.001))
        outcome = store.get(OUTCOME).decode()
    except RuntimeError as error:
        raise PeerLostError(f"rank 0 or the launcher, which holds the ranks' store, is gone: {REMEDY}") from error
    require(
        outcome == COMPLETE,
        f"{outcome}: give each process of a start a rank of its own, and each start a MASTER_PORT of its own",
    )
