"""Signals that announce the end of this process: SIGTERM, SIGUSR1 (SLURM's choice), or Ctrl-C.

Before training the first signal ends the process. In training it is noted, the step is finished and the state saved; a
second signal ends the process at once. A thread decides this, because the main thread may be inside a collective call
that does not return, where Python runs no signal handler.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 75
"""Exit status of a run that ended on a signal with its state saved: start it again (sysexits.h, EX_TEMPFAIL)."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_SECONDS = 2.0
"""Signals this close to the first count as the same: a launcher and the process group both get it."""
CLOSE = 0


class SignalListener:
    """Calls `take` with each signal, in a thread, until it is closed; to be made in the main thread."""

    def __init__(self, take: Callable[[signal.Signals], object]) -> None:
        self._take = take
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Python writes the number of each signal that has a handler, whatever the main thread does
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        for number in SIGNALS:
            signal.siginterrupt(number, False)  # system calls of libraries are restarted
        self._thread = threading.Thread(target=self._listen, daemon=True, name="signals")
        self._thread.start()

    def _listen(self) -> None:
        while CLOSE not in (numbers := os.read(self._read, 64)):
            for number in numbers:
                if number in SIGNALS:
                    self._take(signal.Signals(number))

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._write, bytes([CLOSE]))
        self._thread.join()
        os.close(self._read)
        os.close(self._write)


class Interruption:
    """Handles the signals of this process until it is closed; to be made in the main thread.

    Args:
        from_start: end the process on a signal before `arm`; False leaves signals to their handlers until then, and
            for good where `arm` is not called in the main thread.
        leave: ends the process with a status.
        clock: seconds.
    """

    def __init__(
        self,
        from_start: bool = True,
        leave: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.received: signal.Signals | None = None
        """The first signal since `arm`."""
        self._leave, self._clock = leave, clock
        self._first, self._armed = 0.0, False
        self._listener = SignalListener(self._take) if from_start else None

    def arm(self) -> None:
        """From now on the first signal requests a graceful stop: it is kept in `received`.

        It stays armed until it is closed: a launcher that ends all ranks after the first must not cut off the last
        lines and files of the others.
        """
        if self._listener is None and threading.current_thread() is threading.main_thread():
            self._listener = SignalListener(self._take)
        self._armed = True

    def _take(self, number: signal.Signals) -> None:
        if not self._armed:
            _say(f"{number.name} before training: nothing to save")
            self._leave(INTERRUPTED)
        elif self.received is None:
            self._first, self.received = self._clock(), number
        elif self._clock() - self._first > REPEAT_SECONDS:
            _say(f"{number.name} again: this rank ends at once; the last checkpoint is whole")
            self._leave(128 + number)

    def close(self) -> None:
        """Restore the previous signal handlers."""
        if self._listener is not None:
            self._listener.close()

    def __enter__(self) -> Interruption:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Block the signals while helper processes start, which must not answer Ctrl-C with a traceback of an import.

    Helpers inherit the mask until `leave_signals_to_parent`; a thread of this process takes the signals.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(_worker: int = 0) -> None:
    """Ignore signals in a helper process, but for SIGTERM of its parent.

    A launcher, SLURM or the terminal signal every process, and the parent finishes its step with the helper. The
    parent's SIGTERM ends a helper that is stuck, for which Python would wait without a limit at its own end.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # sigwaitinfo does not see ignored signals: SIGTERM is blocked instead, in all threads started from this one
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True, name="signals").start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)


def _say(line: str) -> None:
    rank = os.environ.get("RANK")
    print(f"{line}{f' (rank {rank})' if rank else ''}", file=sys.stderr, flush=True)
