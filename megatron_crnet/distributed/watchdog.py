"""Who is missing when ranks wait for each other: every rank tells the others, out of band, what it is doing.

A thread writes a counter and the current step into the launcher's key-value store. When a collective call of
this rank fails or passes its time limit, the counters say which ranks are gone and which wait elsewhere. Where a
collective call cannot fail (NCCL ends the process instead), the thread itself notices and says so.

A host that vanishes without closing its connections keeps a call to the store it held for as long as TCP hopes, and
no time limit of the store changes that. So a second thread, which asks nobody, watches where the first does not return.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from megatron_crnet.utils.errors import PeerLostError

BEAT_SECONDS = 1.0
MARGIN_SECONDS = 30.0
"""How long after the time limit of collective calls, which say it themselves on gloo, the watch says it."""
OVERDUE_SECONDS, ANSWER_SECONDS = 3.0, 10.0
"""When the watchdog takes over from a heartbeat that has not returned, and when the store is said not to answer."""
STACKS_SECONDS = 10.0
"""A disk that is gone together with its host must not keep back the error line."""
RANKS_PER_BEAT = 128
SILENT_STORE = "the process that holds the ranks' store (rank 0 or the launcher) is gone or does not answer"
REMEDY = "look at the log of that rank, then start all ranks again"


def ranks_line(ranks: Collection[int]) -> str:
    """`rank 0, 3-7`: runs of more than two are drawn together, because a thousand may be meant."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank {', '.join(parts)}"


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
        self._looking = self._asked = False
        self._answers, self._returned, self._written = 0, clock(), False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=target, daemon=True, name=target.__name__.strip("_"))
            for target in (self._heartbeat, self._watchdog)
        ]
        for thread in self._threads:
            thread.start()

    def report(self, doing: str, may_take_long: bool = False) -> None:
        """What this rank is doing, e.g. `step 17`.

        Args:
            may_take_long: all ranks may be at it for longer than the limit of `watching`.
        """
        self._doing, self._may_take_long, self._since = doing, may_take_long, self._clock()

    def progress(self) -> None:
        """Note that this rank goes on with what it reported last."""
        self._since = self._clock()

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

    def _heartbeat(self) -> None:
        count = 0
        # each rank reads what all have written: at a thousand ranks more seldom than it beats
        between = 1 + self.world_size // RANKS_PER_BEAT
        while not self._stop.wait(BEAT_SECONDS):
            count += 1
            try:
                self._store.set(f"heartbeat/{self._rank}", f"{count} {self._doing}")
                if self._looking and count % between == 0:
                    self._observe(self._read())
            except (RuntimeError, ValueError):
                return  # the process that holds the store is gone: the watchdog says so
            self._returned = self._clock()
            self._watch()

    def _watchdog(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            if self._clock() - self._returned > OVERDUE_SECONDS:
                self._watch()

    def _watch(self) -> None:
        doing, limit, now = self._doing, self._limit, self._clock()
        still = now - self._since
        if self._asked:
            return
        if limit is None or still < limit / 2:
            self._look(False)
            return
        self._look(True)
        with self._lock:
            peers = list(self._peers.items())
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
        writer = threading.Thread(target=self._write_stacks, args=(self.stacks, error), daemon=True, name="stacks")
        self._written = False
        writer.start()
        writer.join(STACKS_SECONDS)
        return f"; {self.stacks} says where its threads stand" if self._written else ""

    def _write_stacks(self, path: Path, error: BaseException | None) -> None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                if error is not None:
                    traceback.print_exception(error, file=file)
                    file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            self._written = True

    def _look(self, wanted: bool) -> None:
        """Begin or end to note what the peers' heartbeats say."""
        with self._lock:
            if wanted and not self._looking:
                now, others = self._clock(), (rank for rank in range(self.world_size) if rank != self._rank)
                self._peers = {rank: Peer(heard=now, changed=now) for rank in others}
            self._looking = wanted

    def _observe(self, found: dict[int, str]) -> None:
        with self._lock:
            self._answers += 1
            for rank, peer in self._peers.items():
                peer.note(found.get(rank), self._clock())

    def whereabouts(self) -> str:
        """One line on every other rank: gone, or what it reported last. Takes some seconds."""
        self._asked = True
        self._look(False)
        self._look(True)
        before, until = self._answers, time.monotonic() + ANSWER_SECONDS
        while self._answers == before:
            if time.monotonic() > until or not self._threads[0].is_alive():
                return SILENT_STORE
            time.sleep(BEAT_SECONDS / 10)
        # who lives has written something else by then
        self._stop.wait(4 * BEAT_SECONDS * (1 + self.world_size // RANKS_PER_BEAT))
        with self._lock:
            peers = dict(self._peers)
        gone = [rank for rank, peer in peers.items() if peer.values < 2]
        return self._line(gone, {rank: peer.doing for rank, peer in peers.items()})

    def _line(self, gone: list[int], at: dict[int, str]) -> str:
        if self._clock() - self._returned > ANSWER_SECONDS or not self._threads[0].is_alive():
            return f"{SILENT_STORE}; this is rank {self._rank} at {self._doing}"
        doing: dict[str, list[int]] = {}
        for rank in sorted(set(at) - set(gone)):
            doing.setdefault(at[rank], []).append(rank)
        alive = "".join(f"; {ranks_line(ranks)} at {where}" for where, ranks in doing.items())
        lost = f"gone: {ranks_line(gone)}" if gone else "no rank is gone"
        return f"{lost}; this is rank {self._rank} at {self._doing}{alive}"

    def _read(self) -> dict[int, str]:
        keys = {rank: f"heartbeat/{rank}" for rank in range(self.world_size)}
        if not self._store.check([*keys.values()]):
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        # one request for all of a thousand ranks
        values = self._store.multi_get([*keys.values()])
        return {rank: value.decode() for rank, value in zip(keys, values, strict=True)}

    def close(self) -> None:
        """Stop reporting."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2)  # one may be kept by the store of a host that vanished

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
        values: how many different ones were read.
    """

    heard: float
    changed: float
    doing: str = ""
    value: str | None = None
    values: int = 0

    def note(self, value: str | None, now: float) -> None:
        """Take what the store holds now; None where it holds nothing."""
        if value is None or value == self.value:
            return
        self.value, self.heard = value, now
        self.values += 1
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
