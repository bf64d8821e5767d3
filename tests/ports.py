"""Ports for a program that opens them later, which nobody else picks by chance in the meantime."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress

FIRST, END = 20000, 32000
"""Below Linux's ip_local_port_range: a port from bind(0) may be some connection's a second later."""


def free_ports(count: int) -> int:
    """The first of some consecutive ports on which nobody listens."""
    draw = random.SystemRandom()  # test files run beside each other, and may have seeded the other one alike
    for _ in range(1000):
        first = draw.randrange(FIRST, END - count)
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")
