from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from megatron_crnet.utils.signals import (
    INTERRUPTED,
    REPEAT_SECONDS,
    Interruption,
    leave_signals_to_parent,
    signals_held_back,
)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Process:
    """This process with a clock of its own; `left` are the statuses with which it would have ended.

    Attributes:
        looked: how often its clock was read, which is once for each signal in training.
    """

    def __init__(self) -> None:
        self.now, self.left, self.looked = 100.0, list[int](), 0
        self.interruption = Interruption(leave=self.left.append, clock=self.clock)

    def clock(self) -> float:
        now = self.now
        self.looked += 1
        return now

    def send(self, number: signal.Signals) -> None:
        os.kill(os.getpid(), number)


@pytest.fixture
def process() -> Iterator[Process]:
    process = Process()
    yield process
    process.interruption.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_before_training_a_signal_ends_the_process_at_once(process: Process, number: signal.Signals) -> None:
    process.send(number)
    wait_until(lambda: process.left == [INTERRUPTED])
    assert process.interruption.received is None


def test_in_training_the_first_signal_is_noted_and_a_later_one_ends_the_process(process: Process) -> None:
    process.interruption.arm()
    process.send(signal.SIGUSR1)
    wait_until(lambda: process.interruption.received is signal.SIGUSR1)
    process.now += REPEAT_SECONDS + 0.1
    process.send(signal.SIGTERM)
    wait_until(lambda: bool(process.left))
    assert process.left == [128 + signal.SIGTERM]


def test_the_same_warning_on_two_ways_counts_once(process: Process) -> None:
    process.interruption.arm()
    process.send(signal.SIGTERM)
    wait_until(lambda: process.interruption.received is signal.SIGTERM)
    process.now += REPEAT_SECONDS - 0.1
    process.send(signal.SIGTERM)
    process.send(signal.SIGUSR1)
    wait_until(lambda: process.looked == 3)
    process.now += 0.2
    process.send(signal.SIGTERM)
    wait_until(lambda: bool(process.left))
    assert process.left == [128 + signal.SIGTERM]


def test_signals_belong_to_their_former_owner_again(process: Process) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with Interruption(leave=process.left.append):
            pass
        process.send(signal.SIGUSR1)
        wait_until(lambda: seen == [signal.SIGUSR1])
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_signals_are_left_alone_until_it_is_armed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption(from_start=False) as interruption:
        assert signal.getsignal(signal.SIGTERM) is before
        interruption.arm()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: interruption.received is signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_a_process_whose_main_thread_never_returns() -> None:
    """As inside a collective call: C code that runs no Python handler. The signal comes from another process."""
    program = """
import ctypes
from megatron_crnet.utils.signals import Interruption
times = iter([0.0, 10.0])
def clock():
    print("taken", flush=True)
    return next(times)
with Interruption(clock=clock) as interruption:
    interruption.arm()
    print("ready", flush=True)
    lock = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None)
    libc.sem_init(lock, 0, 0)
    while True:
        libc.sem_wait(lock)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "taken\n"
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + signal.SIGTERM
    assert printed == "SIGTERM again: this rank ends at once; the last checkpoint is whole\n"


def test_a_helper_process_takes_no_notice() -> None:
    pid = os.fork()
    if pid == 0:
        leave_signals_to_parent()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        os._exit(7)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 7


@pytest.mark.fault("B19")
@pytest.mark.parametrize("sender", ["the parent", "somebody else"])
def test_a_helper_process_ends_when_its_parent_asks(sender: str) -> None:
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        leave_signals_to_parent()
        os.write(told, b".")
        time.sleep(60)
        os._exit(7)
    os.read(ready, 1)
    if sender == "the parent":
        os.kill(pid, signal.SIGTERM)
    else:
        subprocess.run(["kill", "-TERM", str(pid)], check=True)
        time.sleep(0.2)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM


def test_signals_that_come_while_helpers_start_are_taken_afterwards() -> None:
    taken: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: taken.append(number))
    try:
        with signals_held_back():
            signal.raise_signal(signal.SIGUSR1)
            assert taken == []
        assert taken == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)
