"""Shows how far a long job is: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO


@dataclass(frozen=True)
class Progress:
    """The state of a run of `preprocess`."""

    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents."""
    input_bytes: int
    """Bytes of the files read so far, as they lie on disk."""
    total_input_bytes: int
    """Bytes of all files."""
    seconds: float

    def rates(self) -> str:
        """Documents and megabytes of text a second."""
        seconds = max(self.seconds, 1e-9)
        return f"{self.documents / seconds:,.0f} documents/s, {self.text_bytes / seconds / 1e6:.2f} MB/s"


class ProgressPrinter:
    """A callback for `preprocess`, and a context manager that closes the bar.

    Args:
        interval: seconds between lines where there is no terminal.
        stream: where to write; None means standard error.
    """

    def __init__(self, interval: float = 10.0, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._interval = interval
        self._next_line = time.monotonic() + interval
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
        if self._stream.isatty():
            self._update_bar(progress)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self._interval
            share = progress.input_bytes / max(progress.total_input_bytes, 1)
            print(
                f"{share:.1%} read, {progress.documents:,} documents, {progress.rates()}", file=self._stream, flush=True
            )

    def _update_bar(self, progress: Progress) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=progress.total_input_bytes, unit="B", unit_scale=True, file=self._stream)
        self._bar.set_postfix_str(progress.rates(), refresh=False)
        self._bar.update(progress.input_bytes - self._bar.n)
