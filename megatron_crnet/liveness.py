"""Who is missing when a collective call fails: every rank tells the others, out of band, where it stands.

A thread writes a counter and the current step into the launcher's key-value store. When a collective call of
this rank fails or passes its time limit, the counters say which ranks are gone and which wait elsewhere.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

import torch.distributed as dist

BEAT_SECONDS = 1.0


class Heartbeat:
    """Reports this rank's step until it is closed.

    Args:
        store: a connection of its own to the store that all ranks share.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._doing = "starting"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    def report(self, doing: str) -> None:
        """What this rank is doing, e.g. `step 17`."""
        self._doing = doing

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_SECONDS):
            count += 1
            try:
                self._store.set(f"heartbeat/{self._rank}", f"{count} {self._doing}")
            except (RuntimeError, ValueError):  # the rank that holds the store is gone
                return

    def whereabouts(self) -> str:
        """One line on every other rank: gone, or what it reported last. Takes some seconds."""
        before = self._read()
        if before is None:
            return "the process that holds the ranks' store (rank 0 or the launcher) is gone"
        time.sleep(4 * BEAT_SECONDS)
        after = self._read() or {}
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        gone = [rank for rank in others if before.get(rank) == after.get(rank)]
        alive = [f"rank {rank} at {after[rank].partition(' ')[2]}" for rank in others if rank not in gone]
        lost = f"gone: rank {', '.join(map(str, gone))}" if gone else "no rank is gone"
        return f"{lost}; this is rank {self._rank} at {self._doing}" + (f"; {', '.join(alive)}" if alive else "")

    def _read(self) -> dict[int, str] | None:
        found: dict[int, str] = {}
        try:
            for rank in range(self._world_size):
                key = f"heartbeat/{rank}"
                if self._store.check([key]):
                    found[rank] = self._store.get(key).decode()
        except (RuntimeError, ValueError):
            return None
        return found

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
