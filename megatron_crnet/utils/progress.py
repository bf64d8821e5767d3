"""Shows how far a long job is and how long the rest takes: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
FIRST_LINE_SECONDS = 3.0
"""When the first line with an estimate of the rest appears."""
MEANINGFUL_SHARE = 0.002
"""Of all bytes; estimates from less are not shown."""


def format_duration(seconds: float) -> str:
    """The two largest units of a duration: 3 d 4 h, 12 min 5 s, 40 s, 0.8 s; ? where nothing is known."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds >= 1000 * UNITS[0][1]:
        return f"{seconds / UNITS[0][1]:,.0f} d"
    left = round(seconds)
    found: list[str] = []
    for name, size in UNITS:
        count, left = divmod(left, size)
        if count or found:
            found.append(f"{count} {name}")
    return " ".join(found[:2])


@contextmanager
def periodic_lines(
    line: Callable[[float], str], interval: float = 5.0, write: Callable[[str], object] | None = None
) -> Iterator[None]:
    """While the block runs, write a line on standard error every `interval` seconds, also without a terminal.

    Args:
        line: gives the line for the seconds that have passed.
        interval: seconds; it doubles after each ten lines, so that a long job does not fill its log.
    """
    ended, started = threading.Event(), time.monotonic()

    def run() -> None:
        wait, lines = interval, 0
        while not ended.wait(wait):
            (write or _print)(line(time.monotonic() - started))
            lines += 1
            wait = wait if lines % 10 else 2 * wait

    thread = threading.Thread(target=run, daemon=True, name="periodic lines")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _print(line: str, stream: TextIO | None = None) -> None:
    print(line, file=stream or sys.stderr, flush=True)


@dataclass(frozen=True)
class Progress:
    """How far a corpus was read.

    Attributes:
        text_bytes: UTF-8 bytes of the documents.
        tokens: token ids of the documents; 0 where nothing is tokenized.
        input_bytes: bytes read so far of the files on disk.
        total_input_bytes: bytes of all files; None when standard input is one of them.
    """

    documents: int
    text_bytes: int
    tokens: int
    input_bytes: int
    total_input_bytes: int | None
    files: int
    seconds: float

    def rates(self) -> str:
        """Documents and megabytes of text per second."""
        seconds = max(self.seconds, 1e-9)
        return f"{self.documents / seconds:,.0f} documents/s, {self.text_bytes / seconds / 1e6:.2f} MB/s"

    def line(self) -> str:
        """Amounts, rates and an estimate of the rest."""
        total = self.total_input_bytes
        share = self.input_bytes / max(total, 1) if total is not None else 0.0
        read = f"{self.input_bytes / 1e6:,.0f} MB read" if total is None else f"{share:.1%} read"
        tokens = f"{self.tokens:,} tokens, " if self.tokens else ""
        line = f"{read}, {self.documents:,} documents, {tokens}{self.rates()}"
        if not MEANINGFUL_SHARE <= share < 1:
            return line
        rest = (1 - share) / share
        tokens = f" and {self.tokens * rest:,.0f} tokens" if self.tokens else ""
        return f"{line}, about {format_duration(self.seconds * rest)}{tokens} to go"


class _Printer:
    """Writes to `stream`, None for standard error, a line every `interval` seconds; the first comes earlier."""

    def __init__(self, interval: float = 10.0, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._interval, self._started = interval, time.monotonic()
        self._next_line = self._started + min(interval, FIRST_LINE_SECONDS)

    def _is_due(self) -> bool:
        now = time.monotonic()
        due = now >= self._next_line
        self._next_line = now + self._interval if due else self._next_line
        return due


class ProgressPrinter(_Printer):
    """A callback for `preprocess` and `iter_documents`, and a context manager that closes the bar."""

    _bar: Any = None
    _begun = False

    def __enter__(self) -> ProgressPrinter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, progress: Progress) -> None:
        """Show `progress`."""
        total = progress.total_input_bytes
        if not self._begun:
            self._begun = True
            size = "of unknown size" if total is None else f"{total / 1e6:,.1f} MB"
            _print(f"reading {progress.files:,} files, {size}", self._stream)
        if self._stream.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, unit="B", unit_scale=True, file=self._stream)
            self._bar.set_postfix_str(progress.rates(), refresh=False)
            self._bar.update(progress.input_bytes - self._bar.n)
        elif self._is_due():
            _print(progress.line(), self._stream)


class CountPrinter(_Printer):
    """Prints how much of `total` is done and how long the rest takes; `what` is the unit, in the plural."""

    def __init__(self, what: str, total: int, interval: float = 10.0, stream: TextIO | None = None) -> None:
        super().__init__(interval, stream)
        self._what, self._total = what, total

    def __call__(self, done: int) -> None:
        """Note that `done` of them are done by now."""
        if 0 < done < self._total and self._is_due():
            rest = (time.monotonic() - self._started) * (self._total - done) / done
            _print(f"{done:,} of {self._total:,} {self._what}, about {format_duration(rest)} to go", self._stream)
