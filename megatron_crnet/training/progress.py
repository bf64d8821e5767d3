"""Progress on the terminal or in a log file."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import AbstractContextManager, suppress
from typing import Any, TextIO

from tqdm import tqdm

from megatron_crnet.utils.progress import format_duration

FIRST_LINE_SECONDS, CHECK_SECONDS = 5.0, 1.0
"""Seconds without a line after which one is printed, the first time; and between two looks at the clock."""


def printable(text: str, stream: TextIO) -> str:
    """Text with what the stream's encoding does not know written as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _besides(values: dict[str, Any]) -> str:
    """The losses beside the cross-entropy."""
    return "".join(f"{name[:-5]} loss {value:.4g} | " for name, value in values.items() if name.endswith("_loss"))


class Progress(AbstractContextManager["Progress"]):
    """A bar on a terminal, plain lines where the output goes to a file; silent on ranks other than the main one.

    As a context manager it also prints a line while a step takes long, first after 5 seconds without one.

    Args:
        total: steps of the run.
        start: steps that are done.
    """

    def __init__(self, total: int, start: int, is_main: bool) -> None:
        self.total, self.is_main = total, is_main
        self._lines = is_main and not (sys.stdout.isatty() and sys.stderr.isatty())
        bar = is_main and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if bar else None
        self._step, self._first = start, start
        self._started = self._after_first = time.monotonic()
        self._last_line, self._interval = self._started, FIRST_LINE_SECONDS
        self._ended = threading.Event()

    def advance(self, step: int, values: dict[str, Any] | None) -> None:
        """One step done; `values` are given on logged steps."""
        self._step = step
        if step == self._first + 1:  # the first step includes start-up
            self._after_first = time.monotonic()
        if self._bar is not None:
            with suppress(OSError):  # a closed terminal
                self._bar.update(1)
                if values:
                    speed = f"{values['tokens_per_s']:,.0f} tokens/s"
                    self._bar.set_postfix_str(f"loss {values['loss']:.4f} lr {values['lr']:.2e} {speed}")
        if values and self._lines:
            self.line(
                f"step {step}/{self.total} | loss {values['loss']:.4f} | {_besides(values)}"
                f"grad norm {values['grad_norm']:.3f} | "
                f"lr {values['lr']:.3e} | {values['tokens_per_s']:.0f} tokens/s | "
                f"{values['step_time_s'] * 1000:.0f} ms | ETA {self.time_left()}"
            )
        elif self._lines and time.monotonic() - self._last_line >= self._interval:
            self._unlogged(f"step {step}/{self.total} | ETA {self.time_left()}")

    def time_left(self) -> str:
        """By the mean time of all steps but the first, validation and saving included."""
        done, left = self._step - self._first, self.total - self._step
        if left <= 0:
            return format_duration(0.0)
        if done < 1:
            return "?"
        now = time.monotonic()
        if done == 1:
            return f"under {format_duration(left * (now - self._started))}"
        return format_duration(left * (now - self._after_first) / (done - 1))

    def line(self, text: str) -> None:
        """One line of text that does not break the bar."""
        if not self.is_main:
            return
        self._last_line = time.monotonic()
        with suppress(OSError):  # a full disk, a closed terminal
            if self._bar is not None and not self._lines:
                self._bar.write(printable(text, sys.stderr))
            else:
                print(printable(text, sys.stdout), flush=True)

    def _unlogged(self, text: str) -> None:
        """A line between two logged steps; the next one waits twice as long, up to a minute."""
        self.line(text)
        self._interval = min(2 * self._interval, 60.0)

    def _watch(self) -> None:
        while not self._ended.wait(CHECK_SECONDS):
            waited = time.monotonic() - self._last_line
            if self._bar is not None:
                self._bar.refresh()
            elif waited >= self._interval:
                since = f"running for {format_duration(waited)} since step {self._step}/{self.total}"
                self._unlogged(f"{since} | ETA {self.time_left()}")

    def __enter__(self) -> Progress:
        if self.is_main:
            self._started = self._last_line = time.monotonic()
            threading.Thread(target=self._watch, daemon=True, name="progress").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._ended.set()
        if self._bar is not None:
            self._bar.close()
