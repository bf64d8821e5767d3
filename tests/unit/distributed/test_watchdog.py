from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_crnet.distributed import watchdog
from megatron_crnet.distributed.rendezvous import wait_for_all
from megatron_crnet.distributed.watchdog import Heartbeat, ranks_line, report_lost_ranks
from megatron_crnet.utils.errors import PeerLostError

LIMIT_S = 60.0


class World:
    """Heartbeats of some ranks over one store, with a clock of their own; `lost` is what their watches said."""

    def __init__(self, size: int) -> None:
        self.store, self.now, self.lost = dist.HashStore(), 0.0, list[str]()
        self.ranks = [
            Heartbeat(self.store, rank, size, on_loss=self.lost.append, clock=lambda: self.now) for rank in range(size)
        ]
        self.alive = set(range(size))
        self.wait_for_beats(1)

    def wait_for_beats(self, number: int) -> None:
        wanted = {rank: self.beats(rank) + number for rank in self.alive}
        deadline = time.monotonic() + 60
        while any(self.beats(rank) < count for rank, count in wanted.items()):
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def beats(self, rank: int) -> int:
        key = f"heartbeat/{rank}"
        return int(self.store.get(key).split()[0]) if self.store.check([key]) else 0

    def pass_time(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.now += 1
            self.wait_for_beats(1)
            self.wait_for_beats(2)  # every rank has looked at the others' beats by now

    def end(self, rank: int) -> None:
        self.alive.discard(rank)
        self.ranks[rank].close()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], World]]:
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.002)
    worlds: list[World] = []

    def start_world(size: int) -> World:
        worlds.append(World(size))
        return worlds[-1]

    yield start_world
    for heartbeat in (heartbeat for world in worlds for heartbeat in world.ranks):
        heartbeat.close()


Start = Callable[[int], World]


def test_a_rank_that_no_longer_reports_is_named_gone_and_the_others_where_they_are(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    # who does not beat for four of these is gone: long enough for a busy machine
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.3)
    world = start(3)
    for heartbeat, doing in zip(world.ranks, ("step 7", "the checkpoint of step 6", "step 7"), strict=True):
        heartbeat.report(doing)
    world.end(2)
    line = world.ranks[0].describe_peers()
    assert line == "gone: rank 2; this is rank 0 at step 7; rank 1 at the checkpoint of step 6"


class VanishedStore:
    """A store whose host has vanished: TCP keeps a call for as long as it hopes, whatever the store's time limit."""

    def __init__(self) -> None:
        self.store, self.vanished, self.end = dist.HashStore(), threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            if self.vanished.is_set():
                self.end.wait()
            return getattr(self.store, name)(*arguments)

        return call


@pytest.mark.fault("B10")
def test_the_watch_says_its_line_when_the_host_of_the_store_has_vanished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.002)
    now, said, lost = [0.0], threading.Event(), list[str]()
    store = VanishedStore()

    def on_loss(line: str) -> None:
        lost.append(line)
        said.set()

    with Heartbeat(store, 1, 2, on_loss=on_loss, clock=lambda: now[0]) as heartbeat, heartbeat.watching(LIMIT_S):
        heartbeat.report("step 7")
        store.vanished.set()
        while now[0] < 89:
            now[0] += 1
            time.sleep(0.004)
        assert not lost
        now[0] = 91
        assert said.wait(60)
        store.end.set()
    assert "minutes 1: the process that holds the ranks' store (rank 0 or the launcher) is gone or does not" in lost[0]
    assert "this is rank 1 at step 7: look at the log" in lost[0]


@pytest.mark.fault("B10")
def test_a_failed_call_is_named_when_the_host_of_the_store_has_vanished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.002)
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 0.1)
    store = VanishedStore()
    store.vanished.set()
    threading.Timer(1.0, store.end.set).start()
    with (
        Heartbeat(store, 1, 2) as heartbeat,
        pytest.raises(PeerLostError, match=r"holds the ranks' store .* is gone or does not answer"),
        report_lost_ranks(heartbeat, 3),
    ):
        raise dist.DistStoreError("wait timeout after 3 ms")


@pytest.mark.fault("B10")
def test_a_disk_that_does_not_answer_keeps_no_error_line_back(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(watchdog, "STACKS_SECONDS", 0.05)
    heartbeat = start(2).ranks[0]
    os.mkfifo(tmp_path / "stacks")  # whose other end nobody opens
    heartbeat.stacks = tmp_path / "stacks"
    assert heartbeat.dump_stacks() == ""


@pytest.mark.fault("B11")
def test_the_watch_leaves_a_rank_alone_whose_step_takes_longer_than_the_limit(start: Start) -> None:
    world = start(2)
    with world.ranks[0].watching(LIMIT_S):
        world.ranks[0].report("step 7")
        for _micro_batch in range(3):
            world.pass_time(60)
            world.ranks[0].progress()
    assert not world.lost


@pytest.mark.parametrize(
    ("ranks", "line"),
    [([1], "rank 1"), ([1, 2], "rank 1, 2"), ([7, 1, 4, 5, 6], "rank 1, 4-7"), (range(999), "rank 0-998")],
)
def test_many_ranks_are_named_in_a_short_line(ranks: Sequence[int], line: str) -> None:
    assert ranks_line(ranks) == line


def test_the_watch_names_a_peer_that_is_gone_after_the_limit_and_a_margin(start: Start) -> None:
    world = start(2)
    with world.ranks[0].watching(LIMIT_S):
        world.ranks[0].report("step 7")
        world.end(1)
        world.pass_time(89)
        assert not world.lost
        world.pass_time(2)
    assert world.lost[0].startswith("error (rank 0): no progress for 90 s, longer than parallel.distributed_timeout")
    assert "_minutes 1: gone: rank 1; this is rank 0 at step 7: look at the log" in world.lost[0]


def test_the_watch_names_a_peer_that_stands_elsewhere(start: Start) -> None:
    world = start(2)
    with world.ranks[0].watching(LIMIT_S):
        world.ranks[0].report("step 7")
        world.ranks[1].report("the checkpoint of step 6")
        world.pass_time(91)
    assert "no rank is gone; this is rank 0 at step 7; rank 1 at the checkpoint of step 6" in world.lost[0]


def test_the_watch_lets_all_ranks_take_their_time_over_the_same_work(start: Start) -> None:
    world = start(2)
    with world.ranks[0].watching(LIMIT_S), world.ranks[1].watching(LIMIT_S):
        for heartbeat in world.ranks:
            heartbeat.report("the checkpoint of step 6", may_take_long=True)
        world.pass_time(150)
        world.ranks[0].report("step 7")  # the other follows soon
        world.pass_time(20)
        world.ranks[1].report("step 7")
        world.pass_time(10)
    assert not world.lost


def test_the_watch_ends_ranks_that_stand_together_in_a_step(start: Start) -> None:
    """As in a collective call of NCCL, which does not fail, on ranks whose other threads live."""
    world = start(2)
    with world.ranks[0].watching(LIMIT_S):
        for heartbeat in world.ranks:
            heartbeat.report("step 7")
        world.pass_time(89)
        assert not world.lost
        world.pass_time(2)
    assert "no rank is gone; this is rank 0 at step 7; rank 1 at step 7: look at" in world.lost[0]


def test_the_watch_leaves_a_rank_alone_that_goes_on_and_one_that_has_finished(start: Start) -> None:
    world = start(2)
    with world.ranks[0].watching(LIMIT_S):
        world.end(1)
        for step in range(3):
            world.ranks[0].report(f"step {step}")
            world.pass_time(60)
    world.pass_time(100)
    assert not world.lost


def test_a_failed_collective_call_becomes_a_line_and_another_error_stays(start: Start) -> None:
    world = start(2)
    first = world.ranks[0]
    world.end(1)
    with (
        pytest.raises(PeerLostError, match="minutes 3: gone: rank 1; this is rank 0 at starting"),
        report_lost_ranks(first, 3),
    ):
        raise dist.DistStoreError("wait timeout after 3 ms")
    with pytest.raises(RuntimeError, match="shapes"), report_lost_ranks(first, 3):
        raise RuntimeError("shapes do not match")


def test_where_no_rank_is_gone_the_line_says_why_the_call_failed(start: Start) -> None:
    """NCCL's own mistakes of a start are such errors, and no log of another rank has them."""
    with (
        pytest.raises(PeerLostError, match=r"failed \(DistBackendError: NCCL error .* Duplicate GPU .*\) or waited"),
        report_lost_ranks(start(2).ranks[0], 3),
    ):
        raise dist.DistBackendError(
            "NCCL error in: NCCLUtils.cpp:94\nLast error:\nDuplicate GPU detected: rank 1 and 0"
        )


def test_nccls_record_is_written_beside_the_stacks(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """NCCL's own timeout, which would write it, comes after this watchdog has ended the process."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"record", raising=False)
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", str(tmp_path / "nccl_trace_rank_"))
    heartbeat = start(2).ranks[1]
    heartbeat.stacks = tmp_path / "stacks"
    assert "holds the stacks" in heartbeat.dump_stacks()
    assert (tmp_path / "nccl_trace_rank_1").read_bytes() == b"record"


def test_ranks_that_have_not_arrived_are_named() -> None:
    store = dist.HashStore()
    store.set("arrived/2", "")
    with pytest.raises(
        PeerLostError, match=r"rank 1, 3 of 4 did not arrive within .*distributed_timeout_minutes 0.001"
    ):
        wait_for_all(store, 0, 4, 0.001)
