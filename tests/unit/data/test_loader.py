"""Batches: which samples a step uses in every layout, and the end of the workers."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_crnet.data.loader import SAMPLE_KEYS, global_batches
from megatron_crnet.utils.errors import ConfigError, DataError


class Numbers(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sample i is the number i, with a key that batches must drop."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        value = torch.full((4,), index)
        return {"tokens": value, "labels": value, "position_ids": value, "loss_mask": torch.ones(4), "other": "x"}


def sample_numbers(step: list[dict[str, Tensor]]) -> list[list[int]]:
    return [batch["tokens"][:, 0].tolist() for batch in step]


def test_micro_batches_are_those_of_the_formula() -> None:
    global_batch, micro, ranks, first = 24, 3, 2, 48
    for rank in range(ranks):
        steps = list(
            global_batches(
                Numbers(150),
                first_sample=first,
                global_batch_size=global_batch,
                micro_batch_size=micro,
                dp_rank=rank,
                dp_size=ranks,
                num_workers=0,
            )
        )
        assert len(steps) == (150 - first) // global_batch
        for k, step in enumerate(steps):
            starts = [first + k * global_batch + (m * ranks + rank) * micro for m in range(4)]
            assert sample_numbers(step) == [list(range(start, start + micro)) for start in starts]
            assert set(step[0]) == {"tokens", "labels", "position_ids", "loss_mask"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_layout_uses_the_same_samples_in_a_step(num_workers: int) -> None:
    for micro, ranks in itertools.product((1, 2, 4), (1, 2, 3)):
        if num_workers and (micro, ranks) != (2, 2):
            continue
        per_rank = [
            list(
                global_batches(
                    Numbers(100),
                    first_sample=24,
                    global_batch_size=24,
                    micro_batch_size=micro,
                    dp_rank=rank,
                    dp_size=ranks,
                    num_workers=num_workers,
                    num_steps=3,
                )
            )
            for rank in range(ranks)
        ]
        for k in range(3):
            used = [n for steps in per_rank for batch in sample_numbers(steps[k]) for n in batch]
            assert sorted(used) == list(range(24 + 24 * k, 24 + 24 * (k + 1)))


def one_rank(dataset: Any, **options: Any) -> Iterator[list[dict[str, Tensor]]]:
    defaults = {"first_sample": 0, "global_batch_size": 4, "micro_batch_size": 2, "num_workers": 0}
    return global_batches(dataset, dp_rank=0, dp_size=1, **{**defaults, **options})


def wait_for_no_children() -> None:
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert multiprocessing.active_children() == []


def test_workers_end_when_exhausted_and_when_dropped() -> None:
    assert [sample_numbers(step) for step in one_rank(Numbers(9), num_workers=2)] == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
    ]
    wait_for_no_children()
    steps = one_rank(Numbers(1000), num_workers=2)
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    del steps
    wait_for_no_children()


def test_workers_outlive_a_warning_that_reaches_the_whole_process_group() -> None:
    steps = one_rank(Numbers(1000), num_workers=1)
    next(steps)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        assert worker.pid is not None
        # as a launcher does, which is not the worker's parent
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    assert [sample_numbers(next(steps)) for _ in range(20)]
    assert worker.is_alive()
    del steps
    wait_for_no_children()


def test_reading_leaves_torchs_random_state_alone() -> None:
    before = torch.get_rng_state()
    list(one_rank(Numbers(8)))
    list(one_rank(Numbers(8), num_workers=1))
    assert torch.equal(before, torch.get_rng_state())


def test_batches_refuse_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="use a multiple of 3"):
        one_rank(Numbers(8), micro_batch_size=3)
    with pytest.raises(DataError, match="need 12 samples, but the dataset holds 11"):
        one_rank(Numbers(11), num_steps=3)
    assert list(one_rank(Numbers(8), first_sample=8)) == []


class Stuck:
    """A dataset of which one sample never comes."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        while number >= 4:
            time.sleep(60)
        return {key: torch.tensor([number]) for key in SAMPLE_KEYS}


@pytest.mark.fault("B19")
def test_a_worker_that_is_stuck_ends_with_the_iterator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    batches = global_batches(
        Stuck(), first_sample=0, global_batch_size=4, micro_batch_size=4, dp_rank=0, dp_size=1, num_workers=1
    )
    next(batches)
    (worker,) = multiprocessing.active_children()
    batches.close()  # type: ignore[attr-defined]
    del batches
    worker.join(timeout=30)
    assert not worker.is_alive()


@pytest.mark.fault("B19")
@pytest.mark.parametrize("cuda", [True, False])
def test_batches_for_a_gpu_lie_in_pinned_memory(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def loader(dataset: Any, **options: Any) -> list[Any]:
        asked.update(options)
        return []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr("megatron_crnet.data.loader.DataLoader", loader)
    steps = global_batches(
        Stuck(), first_sample=0, global_batch_size=4, micro_batch_size=4, dp_rank=0, dp_size=1, num_workers=0
    )
    next(steps, None)
    assert asked["pin_memory"] is cuda
