"""Watchdog: detects lost and stalled ranks.

A thread of each rank writes a counter and what the rank is doing into the launcher's key-value store. When a collective
call fails or times out, the counters tell which ranks are gone and what the others do. Where a collective call cannot
fail (NCCL ends the process instead), the thread itself notices, prints that line and ends the process.

A host that vanishes without closing its connections blocks calls to the store it held until TCP gives up, whatever the
store's timeout. So a second thread, which makes no such call, takes over while the first is blocked.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_crnet.utils.errors import PeerLostError, describe

BEAT_SECONDS = 1.0
MARGIN_SECONDS = 30.0
"""How long after the timeout of collective calls, which gloo reports itself, the watchdog ends the process."""
OVERDUE_SECONDS, ANSWER_SECONDS = 3.0, 10.0
"""When the second thread takes over from a blocked heartbeat, and when the store counts as not answering."""
STACKS_SECONDS = 10.0
"""Most time for writing stacks: a disk that is gone together with its host must not delay the error line."""
RANKS_PER_BEAT = 128
SILENT_STORE = "the process that holds the ranks' store (rank 0 or the launcher) is gone or does not answer"
GONE = "gone"
REMEDY = "look at the log of that rank, then start all ranks again"


def ranks_line(ranks: Collection[int]) -> str:
    """`rank 0, 3-7`: more than two consecutive ranks are a range."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank {', '.join(parts)}"


def end_process(line: str) -> None:
    """Print the error and end this process, whose main thread is inside a call that does not return."""
    print(line, file=sys.stderr, flush=True)
    os._exit(PeerLostError.exit_status)


def write_flight_record(rank: int) -> None:
    """Write which collective calls NCCL has begun and ended, where its own timeout, which comes later, would do so.

    `torchfrtrace` reads the files of all ranks.
    """
    prefix = os.environ.get("TORCH_FR_DUMP_TEMP_FILE") or os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    if prefix and dist.is_initialized() and dist.get_backend() == "nccl":
        with suppress(OSError, RuntimeError):
            record = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]  # in builds with NCCL
            Path(f"{prefix}{rank}").write_bytes(record)


class Heartbeat(AbstractContextManager["Heartbeat"]):
    """Reports what this rank is doing until it is closed.

    Args:
        store: a connection of its own to the store that all ranks share.
        on_loss: takes the line of `watching`.
        clock: seconds, for `watching`.

    Attributes:
        stacks: file for the stacks of this rank's threads when it gives up waiting for its peers.
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
        self._store, self._rank, self._on_loss, self._clock = store, rank, on_loss, clock
        self._doing, self._may_take_long, self._since = "starting", True, clock()
        self._limit: float | None = None
        self._peers: dict[int, Peer] = {}
        self._observing = self._describing = False
        self._observations, self._returned = 0, clock()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=target, daemon=True, name=target.__name__.strip("_"))
            for target in (self._heartbeat, self._watchdog)
        ]
        for thread in self._threads:
            thread.start()

    def report(self, doing: str, may_take_long: bool = False) -> None:
        """Set what this rank is doing, e.g. `step 17`.

        Args:
            may_take_long: on all ranks it may take longer than the limit of `watching`.
        """
        self._doing, self._may_take_long, self._since = doing, may_take_long, self._clock()

    def progress(self) -> None:
        """Note progress in what was reported last."""
        self._since = self._clock()

    @contextmanager
    def watching(self, limit_s: float) -> Iterator[None]:
        """End this process when it is stalled: no report or progress for `limit_s` and a margin.

        During work that may take long, only if besides, for `limit_s` / 2, some peer has not reported at all, or has
        been at something else.
        """
        self._since, self._limit = self._clock(), limit_s if self.world_size > 1 else None
        try:
            yield
        finally:
            self._limit = None

    def _heartbeat(self) -> None:
        count = 0
        # a thousand ranks that each read what all have written do so less often
        between = 1 + self.world_size // RANKS_PER_BEAT
        while not self._stop.wait(BEAT_SECONDS):
            count += 1
            try:
                self._store.set(f"heartbeat/{self._rank}", f"{count} {self._doing}")
                if self._observing and count % between == 0:
                    self._read_peers()
            except (RuntimeError, ValueError):
                return  # the process that holds the store is gone: the watchdog reports it
            self._returned = self._clock()
            self._check()

    def _watchdog(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            if self._clock() - self._returned > OVERDUE_SECONDS:
                self._check()

    def _check(self) -> None:
        doing, limit, now = self._doing, self._limit, self._clock()
        idle = now - self._since
        if self._describing:
            return
        if limit is None or idle < limit / 2:
            self._observe(False)
            return
        self._observe(True)
        with self._lock:
            peers = dict(self._peers)
        silent = [rank for rank, peer in peers.items() if now - peer.heard >= limit / 2]
        elsewhere = any(peer.doing != doing and now - peer.changed >= limit / 2 for peer in peers.values())
        stalled = silent or elsewhere or not self._may_take_long
        if idle >= limit + MARGIN_SECONDS and stalled and self._limit is not None:
            self._on_loss(
                f"error (rank {self._rank}): no progress for {idle:.0f} s, longer than "
                f"parallel.distributed_timeout_minutes {limit / 60:g}: {self._line(silent, peers)}: {REMEDY}"
                f"{self.dump_stacks()}"
            )

    def _observe(self, wanted: bool) -> None:
        """Start or stop reading the heartbeats of peers."""
        with self._lock:
            if wanted and not self._observing:
                now, others = self._clock(), (rank for rank in range(self.world_size) if rank != self._rank)
                self._peers = {rank: Peer(heard=now, changed=now) for rank in others}
            self._observing = wanted

    def _read_peers(self) -> None:
        keys = {rank: f"heartbeat/{rank}" for rank in self._peers}
        if not self._store.check([*keys.values()]):
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        values = self._store.multi_get([*keys.values()])  # one request for all
        with self._lock:
            self._observations += 1
            for rank, value in zip(keys, values, strict=True):
                self._peers[rank].note(value.decode(), self._clock())

    def describe_peers(self) -> str:
        """One line on every other rank: gone, or what it reported last. Takes some seconds."""
        self._describing = True
        self._observe(False)
        self._observe(True)
        before, until = self._observations, time.monotonic() + ANSWER_SECONDS
        while self._observations == before:
            if time.monotonic() > until or not self._threads[0].is_alive():
                return SILENT_STORE
            time.sleep(BEAT_SECONDS / 10)
        # a live rank has written another value by then
        self._stop.wait(4 * BEAT_SECONDS * (1 + self.world_size // RANKS_PER_BEAT))
        with self._lock:
            peers = dict(self._peers)
        return self._line([rank for rank, peer in peers.items() if peer.values < 2], peers)

    def _line(self, gone: list[int], peers: dict[int, Peer]) -> str:
        if self._clock() - self._returned > ANSWER_SECONDS or not self._threads[0].is_alive():
            return f"{SILENT_STORE}; this is rank {self._rank} at {self._doing}"
        doing: dict[str, list[int]] = {}
        for rank, peer in peers.items():
            if rank not in gone:
                doing.setdefault(peer.doing, []).append(rank)
        alive = "".join(f"; {ranks_line(ranks)} at {what}" for what, ranks in doing.items())
        lost = f"{GONE}: {ranks_line(gone)}" if gone else "no rank is gone"
        return f"{lost}; this is rank {self._rank} at {self._doing}{alive}"

    def dump_stacks(self, error: BaseException | None = None) -> str:
        """Write `stacks`, after the traceback of `error`, and NCCL's record. Returns what an error line says of it."""
        if (path := self.stacks) is None:
            return ""
        written = threading.Event()

        def write() -> None:
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("w") as file:
                    if error is not None:
                        traceback.print_exception(error, file=file)
                        file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
                written.set()
            write_flight_record(self._rank)

        writer = threading.Thread(target=write, daemon=True, name="stacks")
        writer.start()
        writer.join(STACKS_SECONDS)
        return f"; {path} holds the stacks of its threads" if written.is_set() else ""

    def close(self) -> None:
        """Stop reporting."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2)  # one may be blocked in the store of a host that vanished

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Peer:
    """What a peer's heartbeat says; times are those of this rank's clock, since it began to observe.

    Attributes:
        heard: time of its last heartbeat.
        changed: time since which it reports the same.
        values: how many different ones were read.
    """

    heard: float
    changed: float
    doing: str = ""
    value: str = ""
    values: int = 0

    def note(self, value: str, now: float) -> None:
        """Take what the store holds now."""
        if value == self.value:
            return
        self.value, self.heard = value, now
        self.values += 1
        doing = value.partition(" ")[2]
        if doing != self.doing:
            self.doing, self.changed = doing, now


@contextmanager
def report_lost_ranks(heartbeat: Heartbeat, limit_minutes: float) -> Iterator[None]:
    """Turn a failed collective call into a line on which ranks are lost; any error ends the heartbeat.

    Raises:
        PeerLostError: another rank died or is stalled.
    """
    try:
        yield
    except BaseException as error:
        if heartbeat.world_size == 1 or not is_communication(error):
            heartbeat.close()
            raise
        peers, stacks = heartbeat.describe_peers(), heartbeat.dump_stacks(error)
        heartbeat.close()
        reason = "" if peers.startswith(GONE) else f" ({describe(error)})"  # it may be no peer's fault
        raise PeerLostError(
            f"a collective call failed{reason} or waited longer than parallel.distributed_timeout_minutes "
            f"{limit_minutes:g}: {peers}: {REMEDY}{stacks}"
        ) from error


def is_communication(error: BaseException) -> bool:
    """Whether a collective call failed. Gloo raises plain RuntimeErrors, which name it or its source files."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
