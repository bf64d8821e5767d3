"""Shows how far a long job is: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

FIRST_LINE_SECONDS = 3.0
"""When the first line with an estimate of the rest appears."""
MEANINGFUL_SHARE = 0.002
"""Of all bytes; what is estimated from less is not shown."""


@dataclass(frozen=True)
class Progress:
    """How far a corpus was read."""

    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents."""
    tokens: int
    """Token ids of the documents; 0 where nothing is tokenized."""
    input_bytes: int
    """Bytes of the files read so far, as they lie on disk."""
    total_input_bytes: int | None
    """Bytes of all files; None when standard input is one of them."""
    files: int
    seconds: float

    def rates(self) -> str:
        """Documents and megabytes of text per second."""
        seconds = max(self.seconds, 1e-9)
        return f"{self.documents / seconds:,.0f} documents/s, {self.text_bytes / seconds / 1e6:.2f} MB/s"

    def share(self) -> float | None:
        """Share of all bytes that were read."""
        return self.input_bytes / max(self.total_input_bytes, 1) if self.total_input_bytes is not None else None

    def line(self) -> str:
        """All of it, and what is left."""
        share = self.share()
        read = f"{self.input_bytes / 1e6:,.0f} MB read" if share is None else f"{share:.1%} read"
        tokens = f"{self.tokens:,} tokens, " if self.tokens else ""
        line = f"{read}, {self.documents:,} documents, {tokens}{self.rates()}"
        if share is None or share < MEANINGFUL_SHARE or share >= 1:
            return line
        rest = (1 - share) / share
        tokens = f" and {self.tokens * rest:,.0f} tokens" if self.tokens else ""
        return f"{line}, about {duration(self.seconds * rest)}{tokens} to go"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


class ProgressPrinter:
    """A callback for `preprocess` and `iter_documents`, and a context manager that closes the bar.

    Args:
        interval: seconds between lines where there is no terminal.
        stream: where to write; None means standard error.
    """

    def __init__(self, interval: float = 10.0, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._interval = interval
        self._next_line = time.monotonic() + min(interval, FIRST_LINE_SECONDS)
        self._begun = False
        self._bar: Any = None

    def __enter__(self) -> ProgressPrinter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, progress: Progress) -> None:
        """Show `progress`."""
        if not self._begun:
            self._begun = True
            total = progress.total_input_bytes
            size = "of unknown size" if total is None else f"{total / 1e6:,.1f} MB"
            print(f"reading {progress.files:,} files, {size}", file=self._stream, flush=True)
        if self._stream.isatty():
            self._update_bar(progress)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self._interval
            print(progress.line(), file=self._stream, flush=True)

    def _update_bar(self, progress: Progress) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=progress.total_input_bytes, unit="B", unit_scale=True, file=self._stream)
        self._bar.set_postfix_str(progress.rates(), refresh=False)
        self._bar.update(progress.input_bytes - self._bar.n)


class CountPrinter:
    """Says on standard error how much of a known amount is done and how long the rest takes, now and then.

    Args:
        what: the unit, in the plural.
        total: how many there are.
        interval: seconds between lines; the first comes after FIRST_LINE_SECONDS.
        stream: where to write; None means standard error.
    """

    def __init__(self, what: str, total: int, interval: float = 10.0, stream: TextIO | None = None) -> None:
        self._what, self._total, self._interval = what, total, interval
        self._stream = sys.stderr if stream is None else stream
        self._started = time.monotonic()
        self._next_line = self._started + min(interval, FIRST_LINE_SECONDS)

    def __call__(self, done: int) -> None:
        """Note that `done` of them are done by now."""
        now = time.monotonic()
        if now < self._next_line or not 0 < done < self._total:
            return
        self._next_line = now + self._interval
        rest = (now - self._started) * (self._total - done) / done
        line = f"{done:,} of {self._total:,} {self._what}, about {duration(rest)} to go"
        print(line, file=self._stream, flush=True)
