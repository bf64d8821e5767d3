from __future__ import annotations

import math
import time

import pytest

from megatron_crnet.utils.progress import format_duration, periodic_lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.8 s"),
        (42, "42 s"),
        (725, "12 min 5 s"),
        (3600, "1 h 0 min"),
        (273_600, "3 d 4 h"),
        (1e9, "11,574 d"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_a_duration_has_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.fault("M11")
def test_periodic_lines_end_with_their_block() -> None:
    found: list[str] = []
    with periodic_lines(lambda seconds: f"{seconds:.0f}", interval=0.02, write=found.append):
        time.sleep(0.15)
    count = len(found)
    assert count >= 2
    time.sleep(0.05)
    assert len(found) == count
