"""Who is missing when ranks wait for each other: every rank tells the others, out of band, where it stands.

A thread writes a counter and the current step into the launcher's key-value store. When a collective call of
this rank fails or passes its time limit, the counters say which ranks are gone and which wait elsewhere. Where a
collective call cannot fail (NCCL ends the process instead), the thread itself notices and says so.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from megatron_crnet.errors import PeerLostError

BEAT_SECONDS = 1.0
MARGIN_SECONDS = 30.0
"""How long after the time limit of collective calls, which say it themselves on gloo, the watch says it."""
REMEDY = "look at the log of that rank, then start all ranks again"


def end_process(line: str) -> None:
    """Print the error and end this process: its main thread is inside a call that does not return."""
    print(line, file=sys.stderr, flush=True)
    os._exit(PeerLostError.exit_status)


class Heartbeat:
    """Reports this rank's step until it is closed.

    Args:
        store: a connection of its own to the store that all ranks share.
        on_loss: takes the line of `watching`.
        clock: seconds, for `watching`.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        on_loss: Callable[[str], None] = end_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.world_size = world_size
        self.stacks: Path | None = None
        """File that shall say where each thread of this rank stands, when it gives up waiting for its peers."""
        self._store, self._rank, self._on_loss, self._clock = store, rank, on_loss, clock
        self._doing, self._may_take_long, self._since = "starting", True, clock()
        self._limit: float | None = None
        self._peers: dict[int, Peer] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    def report(self, doing: str, may_take_long: bool = False) -> None:
        """What this rank is doing, e.g. `step 17`.

        Args:
            may_take_long: all ranks may be at it for longer than the limit of `watching`.
        """
        self._doing, self._may_take_long, self._since = doing, may_take_long, self._clock()

    @contextmanager
    def watching(self, limit_s: float) -> Iterator[None]:
        """End this process when it can only wait in vain; for work that reports more often than `limit_s`.

        It can when it has reported nothing new for the limit of collective calls and a margin. During work that may
        take long, only if besides, for half the limit, some peer has not reported at all, or the same other thing.
        """
        self._since, self._limit = self._clock(), limit_s if self.world_size > 1 else None
        try:
            yield
        finally:
            self._limit = None

    def _beat(self) -> None:
        count, connected = 0, True
        while not self._stop.wait(BEAT_SECONDS):
            count += 1
            try:
                if connected:
                    self._store.set(f"heartbeat/{self._rank}", f"{count} {self._doing}")
            except (RuntimeError, ValueError):  # the rank that holds the store is gone
                connected = False
            self._watch()

    def _watch(self) -> None:
        doing, limit, now = self._doing, self._limit, self._clock()
        still = now - self._since
        if limit is None or still < limit / 2:
            self._peers.clear()
            return
        self._observe(now)
        peers = self._peers.items()
        stopped = [rank for rank, peer in peers if now - peer.heard >= limit / 2]
        elsewhere = [rank for rank, peer in peers if peer.doing != doing and now - peer.changed >= limit / 2]
        in_vain = stopped or elsewhere or not self._may_take_long
        if still >= limit + MARGIN_SECONDS and in_vain and self._limit is not None:
            at = {rank: peer.doing for rank, peer in peers}
            self._on_loss(
                f"error (rank {self._rank}): no progress for {still:.0f} s, longer than "
                f"parallel.distributed_timeout_minutes {limit / 60:g}: {self._line(stopped, at)}: {REMEDY}"
                f"{self.dump_stacks()}"
            )

    def dump_stacks(self, error: BaseException | None = None) -> str:
        """Write `stacks`, after the traceback of `error`. Returns what an error line says of it."""
        if self.stacks is None:
            return ""
        try:
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            with self.stacks.open("w") as file:
                if error is not None:
                    traceback.print_exception(error, file=file)
                    file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            return ""
        return f"; {self.stacks} says where its threads stand"

    def _observe(self, now: float) -> None:
        """Note what the peers' heartbeats say now; a store that is gone leaves all of them silent."""
        found = self._read() or {}
        for rank in range(self.world_size):
            if rank != self._rank:
                self._peers.setdefault(rank, Peer(heard=now, changed=now)).note(found.get(rank), now)

    def whereabouts(self) -> str:
        """One line on every other rank: gone, or what it reported last. Takes some seconds."""
        before = self._read()
        if before is None:
            return "the process that holds the ranks' store (rank 0 or the launcher) is gone"
        time.sleep(4 * BEAT_SECONDS)
        after = self._read() or {}
        others = [rank for rank in range(self.world_size) if rank != self._rank]
        gone = [rank for rank in others if before.get(rank) == after.get(rank)]
        return self._line(gone, {rank: after[rank].partition(" ")[2] for rank in others if rank not in gone})

    def _line(self, gone: list[int], at: dict[int, str]) -> str:
        alive = [f"rank {rank} at {doing}" for rank, doing in sorted(at.items()) if rank not in gone]
        lost = f"gone: rank {', '.join(map(str, gone))}" if gone else "no rank is gone"
        return f"{lost}; this is rank {self._rank} at {self._doing}" + (f"; {', '.join(alive)}" if alive else "")

    def _read(self) -> dict[int, str] | None:
        keys = {rank: f"heartbeat/{rank}" for rank in range(self.world_size)}
        try:
            if not self._store.check([*keys.values()]):
                keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
            # one request for all of a thousand ranks
            values = self._store.multi_get([*keys.values()])
        except (RuntimeError, ValueError):
            return None
        return {rank: value.decode() for rank, value in zip(keys, values, strict=True)}

    def close(self) -> None:
        """Stop reporting."""
        self._stop.set()
        self._thread.join(timeout=5)

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class Peer:
    """What a peer's heartbeat says; times are those of this rank's clock, since it began to look.

    Attributes:
        heard: time of its last sign of life.
        changed: time since which it reports the same.
    """

    heard: float
    changed: float
    doing: str = ""
    value: str | None = None

    def note(self, value: str | None, now: float) -> None:
        """Take what the store holds now; None where it holds nothing."""
        if value is None or value == self.value:
            return
        self.value, self.heard = value, now
        doing = value.partition(" ")[2]
        if doing != self.doing:
            self.doing, self.changed = doing, now


@contextmanager
def naming_lost_peers(heartbeat: Heartbeat, limit_minutes: float) -> Iterator[None]:
    """Turn a failed collective call into a line on who is missing; any error ends the heartbeat.

    Raises:
        PeerLostError: another rank died or stands still.
    """
    try:
        yield
    except BaseException as error:
        lost = heartbeat.world_size > 1 and is_communication(error)
        whereabouts = heartbeat.whereabouts() if lost else ""
        stacks = heartbeat.dump_stacks(error) if lost else ""
        heartbeat.close()
        if not lost:
            raise
        raise PeerLostError(
            f"a collective call failed or waited longer than parallel.distributed_timeout_minutes {limit_minutes:g}: "
            f"{whereabouts}: {REMEDY}{stacks}"
        ) from error


def is_communication(error: BaseException) -> bool:
    """Whether a collective call failed. Gloo raises plain RuntimeErrors, which name it or its source files."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def wait_for_all(store: dist.Store, rank: int, world_size: int, limit_minutes: float) -> None:
    """Note this rank's arrival in the store and wait for that of all others.

    Raises:
        PeerLostError: names the ranks that have not arrived.
    """
    keys = [f"arrived/{other}" for other in range(world_size)]
    try:
        store.set(keys[rank], "")
        store.wait(keys, timedelta(minutes=limit_minutes))
    except RuntimeError as error:
        raise PeerLostError(
            f"{_missing(store, keys)} within parallel.distributed_timeout_minutes {limit_minutes:g}: {REMEDY}"
        ) from error


def _missing(store: dist.Store, keys: list[str]) -> str:
    try:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:
        return "not all ranks arrived, and rank 0 or the launcher, which knows them, is gone,"
    return f"rank {', '.join(missing)} of {len(keys)} did not arrive"
