"""How long something takes, for people: the time left of a job, and a sign of life while nothing can be counted."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def spell(seconds: float) -> str:
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
def signs_of_life(
    say: Callable[[float], str], interval: float = 5.0, write: Callable[[str], object] | None = None
) -> Iterator[None]:
    """While the block runs, a line on standard error every `interval` seconds, also where there is no terminal.

    Args:
        say: gives the line for the seconds that have passed.
        interval: seconds; it doubles after each ten lines, so that a long job does not fill its log.
    """
    ended, started = threading.Event(), time.monotonic()

    def speak() -> None:
        wait, lines = interval, 0
        while not ended.wait(wait):
            line = say(time.monotonic() - started)
            (write or _to_standard_error)(line)
            lines += 1
            wait = wait if lines % 10 else 2 * wait

    thread = threading.Thread(target=speak, daemon=True, name="signs of life")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
