"""Datasets on several ranks: all read the same samples, which are those of a single process."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.spawn import run_distributed
from tests.unit.data_helpers import build, whole, write_even_and_odd


def samples_of_all_kinds(prefixes: list[str], cache_path: str) -> list[list[int]]:
    """The first samples of a single corpus, of blends and of padded rows."""
    seen = []
    for data in ([prefixes[0]], prefixes, [1, prefixes[0], 3, prefixes[1]]):
        for sample_format in ("packed", "padded"):
            built = build(100, 20, data_path=data, split="80,20,0", cache_path=cache_path, sample_format=sample_format)
            seen += [whole(dataset[i]) for dataset in (built.train, built.valid) for i in range(20)]
    return seen


def test_two_ranks_read_the_samples_of_one_process(tmp_path: Path) -> None:
    prefixes = write_even_and_odd(tmp_path)
    ranks = run_distributed(samples_of_all_kinds, 2, prefixes, str(tmp_path / "shared"))
    alone = samples_of_all_kinds(prefixes, str(tmp_path / "alone"))
    assert ranks == [alone, alone]
    assert list((tmp_path / "shared").rglob("*-StoredBlend-train-dataset_index.npy"))
