"""Datasets on several ranks: all read the same samples, which are those of a single process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_crnet.data.datasets import build_datasets
from megatron_crnet.distributed.consensus import run_on_all_ranks
from megatron_crnet.utils.errors import ConfigError
from tests.distributed.spawn import run_distributed
from tests.unit.data_helpers import VOCAB, PlainTokenizer, build, data_config, whole, write_even_and_odd


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


def build_beside_a_file(prefixes: list[str], folder: str) -> str:
    """On rank 1 a file is where the caches are to be."""
    cache_path = Path(folder, f"cache{dist.get_rank()}")
    if dist.get_rank() == 1:
        cache_path.write_text("in the way")
    config = data_config(train_data_path=prefixes, cache_path=str(cache_path))
    with pytest.raises(ConfigError) as raised:
        build_datasets(config, PlainTokenizer(VOCAB), 4, 0, checked=run_on_all_ranks)
    return str(raised.value)


def test_a_folder_that_one_rank_cannot_write_ends_all(tmp_path: Path) -> None:
    first, second = run_distributed(build_beside_a_file, 2, write_even_and_odd(tmp_path), str(tmp_path))
    assert first.startswith("rank 1 failed: data.cache_path")
    assert second.startswith("data.cache_path")
