"""What a start reads of the data: each file by one of the ranks that see it, and by none when the cache knows it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_crnet.data import fingerprint
from megatron_crnet.data.datasets import Datasets
from megatron_crnet.data.unigram import entropy_of, label_counts
from megatron_crnet.distributed.consensus import report_together
from megatron_crnet.training import preflight, shared_reads
from megatron_crnet.utils.errors import DataError
from tests.distributed.spawn import run_distributed
from tests.unit.data_helpers import VOCAB, data_config, random_documents, write_indexed

RANKS, PREFIXES, SAMPLES = 4, 6, 50


def reads_of(prefixes: list[str], cache: Path) -> dict[str, Any]:
    """What this rank looks through while all of them learn everything."""
    looked, digested = [], []
    range_of, digest_of = shared_reads.id_range, fingerprint._digest_of_file
    shared_reads.id_range = lambda files: looked.append(files.prefix) or range_of(files)
    fingerprint._digest_of_file = lambda path, size: digested.append(path) or digest_of(path, size)
    fingerprint._known.clear()
    try:
        views = report_together(lambda: shared_reads.view_of(prefixes))
        known = shared_reads.read_together(prefixes, views, cache)
        digests = [fingerprint.digest_of_prefix(prefix) for prefix in prefixes]
    finally:
        shared_reads.id_range, fingerprint._digest_of_file = range_of, digest_of
    known.keep()
    dist.barrier()
    return {"looked": looked, "digested": digested, "ids": known.ids, "digests": digests}


def starts(prefixes: list[str], cache: str, own: str) -> list[dict[str, Any]]:
    """A first start, one after it, one after a file was written again, one where rank 3 sees another file."""
    found = [reads_of(prefixes, Path(cache)) for _ in range(2)]
    if dist.get_rank() == 0:
        os.utime(f"{prefixes[0]}.bin", ns=(1, 1))
    dist.barrier()
    found.append(reads_of(prefixes, Path(cache)))
    mine = [own, *prefixes[1:]] if dist.get_rank() == 3 else prefixes
    found.append(reads_of(mine, Path(cache, "other")))
    return found


@pytest.mark.fault("B12")
def test_each_file_is_read_once_per_node_and_not_again_while_it_is_the_same(tmp_path: Path) -> None:
    prefixes = [write_indexed(tmp_path / f"part{i}", random_documents(20, VOCAB, seed=i)) for i in range(PREFIXES)]
    own = write_indexed(tmp_path / "own", random_documents(20, VOCAB, seed=99))
    ranks = run_distributed(starts, RANKS, prefixes, str(tmp_path / "cache"), own)
    first, again, changed, apart = zip(*ranks, strict=True)
    both = sorted(f"{prefix}.{kind}" for prefix in prefixes for kind in ("bin", "idx"))
    assert sorted(prefix for rank in first for prefix in rank["looked"]) == sorted(prefixes)
    assert max(len(rank["looked"]) for rank in first) == 2
    for start in (first, again, changed):
        assert sorted(path for rank in start for path in rank["digested"]) == both
        assert all(rank["ids"] == start[0]["ids"] for rank in start)
        assert all(rank["digests"] == start[0]["digests"] for rank in start)
        assert set(start[0]["ids"]) == set(prefixes)
    assert [prefix for rank in again for prefix in rank["looked"]] == []
    assert [prefix for rank in changed for prefix in rank["looked"]] == prefixes[:1]
    # a rank that sees other files under the same names reads all of its own
    assert apart[3]["looked"] == [own, *prefixes[1:]]
    assert sorted(prefix for rank in apart[:3] for prefix in rank["looked"]) == sorted(prefixes)
    assert apart[3]["digests"][0] != apart[0]["digests"][0]


def fails_on_the_first_rank(prefix: str, other: str, cache: str) -> str:
    views = report_together(lambda: shared_reads.view_of([prefix, other]))
    try:
        shared_reads.read_together([prefix, other], views, Path(cache))
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.fault("B12")
def test_damage_that_one_rank_finds_stops_all(tmp_path: Path) -> None:
    documents = random_documents(20, VOCAB, seed=1)
    damaged, whole = (write_indexed(tmp_path / name, documents) for name in ("damaged", "whole"))
    with Path(f"{damaged}.idx").open("r+b") as file:
        file.seek(34 + 4 * 20 + 8 * 5)
        file.write((10**12).to_bytes(8, "little"))
    first, second = run_distributed(fails_on_the_first_rank, 2, damaged, whole, str(tmp_path / "cache"))
    assert "damaged.idx gives document" in first
    assert second == f"rank 0 failed: {first}"


class Drawn:
    """A dataset that counts what is drawn."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        self.numbers.append(number)
        labels = torch.randint(VOCAB, (16,), generator=torch.Generator().manual_seed(number))
        return {"labels": labels, "loss_mask": torch.ones(16)}


def entropy_and_draws() -> tuple[float | None, list[int], float]:
    valid = Drawn()
    entropy = preflight._entropy(data_config(), Datasets(None, valid, None), SAMPLES, torch.device("cpu"))
    alone = entropy_of(label_counts([Drawn()[i] for i in range(SAMPLES)], VOCAB))
    return entropy, valid.numbers, alone


@pytest.mark.fault("B12")
def test_each_validation_sample_is_drawn_once_for_the_unigram_entropy() -> None:
    ranks = run_distributed(entropy_and_draws, RANKS)
    entropy, _, alone = ranks[0]
    assert all(rank[0] == entropy == alone for rank in ranks)
    drawn = sorted(number for _, numbers, _ in ranks for number in numbers)
    assert drawn == list(range(SAMPLES))


@pytest.mark.parametrize(
    "text", ["", "[", "5", "{}", '{"format": 1, "modified": [1, 2], "ids": [true, 5]}', "[" * 5000]
)
def test_a_damaged_record_of_the_cache_is_none(text: str, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    record.write_text(text)
    assert shared_reads._cached(record, [1, 2]) is None
    record.write_text('{"format": 1, "modified": [1, 2], "ids": [0, 5]}')
    assert shared_reads._cached(record, [1, 2]) == (0, 5)
    assert shared_reads._cached(record, [1, 3]) is None
