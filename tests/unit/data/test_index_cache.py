"""Index caches: numbers only, whatever lies in the folder, and made again when they cannot be this dataset's."""

from __future__ import annotations

import os
import pickle
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_crnet.data.index_cache import PackedDataset
from tests.unit.data_helpers import SEQ, PlainTokenizer, build, whole, write_even_and_odd, write_indexed


class MakesFolder:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return os.mkdir, (self.path,)


def samples(dataset: Any) -> list[list[int]]:
    return [whole(dataset[i]) for i in range(len(dataset))]


def one(prefix: str) -> Any:
    return build(10, data_path=[prefix], split="1,0,0").train


def caches(folder: Path) -> list[Path]:
    return sorted((folder / "cache").rglob("*.npy"))


def harmful(path: Path, proof: Path, how: str) -> None:
    """A file that runs code when it is loaded with pickle."""
    with path.open("wb") as stream:
        if how == "raw pickle":
            pickle.dump(MakesFolder(proof), stream)
        else:
            np.save(stream, np.array([MakesFolder(proof)], dtype=object), allow_pickle=True)


@pytest.mark.fault("F1")
@pytest.mark.parametrize("age", [100, 0, -100])
@pytest.mark.parametrize("how", ["raw pickle", "object array"])
def test_no_cache_runs_code_whatever_its_age(prefix: str, tmp_path: Path, how: str, age: float) -> None:
    expected = samples(one(prefix))
    assert len(caches(tmp_path)) == 3
    for path in caches(tmp_path):
        harmful(path, tmp_path / "proof", how)
        os.utime(path, (time.time() - age,) * 2)
    assert samples(one(prefix)) == expected
    assert not (tmp_path / "proof").exists()


@pytest.mark.fault("F1")
def test_no_cache_of_a_blend_runs_code(tmp_path: Path) -> None:
    prefixes = write_even_and_odd(tmp_path)
    expected = samples(build(10, data_path=prefixes, split="1,0,0").train)
    assert len(caches(tmp_path)) == 2 * 3 + 2
    for path in caches(tmp_path):
        harmful(path, tmp_path / "proof", "raw pickle")
    assert samples(build(10, data_path=prefixes, split="1,0,0").train) == expected
    assert not (tmp_path / "proof").exists()


@pytest.mark.fault("F1")
def test_a_file_that_appears_while_the_caches_are_made_is_not_run(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = samples(one(prefix))
    planted = caches(tmp_path)
    original = PackedDataset.belong_here

    def plant(self: PackedDataset, arrays: Any, values: bool) -> bool:
        for path in planted:
            harmful(path, tmp_path / "proof", "raw pickle")
        return original(self, arrays, values)

    monkeypatch.setattr(PackedDataset, "belong_here", plant)
    one(prefix)
    monkeypatch.undo()
    assert samples(one(prefix)) == expected
    assert not (tmp_path / "proof").exists()


DAMAGE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "shorter": lambda array: array[:-1],
    "an id too large": lambda array: np.where(np.arange(array.size).reshape(array.shape) == 2, 10**6, array),
    "a negative id": lambda array: np.where(np.arange(array.size).reshape(array.shape) == 3, -5, array),
    "floats": lambda array: array.astype(np.float64),
    "another shape": lambda array: array.reshape(-1, 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("number", range(3))
def test_arrays_that_cannotbelong_here_are_made_again(prefix: str, tmp_path: Path, number: int, damage: str) -> None:
    expected = samples(one(prefix))
    path = caches(tmp_path)[number]
    np.save(path, DAMAGE[damage](np.load(path)))
    assert samples(one(prefix)) == expected


@pytest.mark.parametrize("damage", ["shorter", "an id too large", "a negative id"])
@pytest.mark.parametrize("name", ["dataset_index", "dataset_sample_index"])
def test_an_order_of_a_blend_that_cannotbelong_here_is_made_again(tmp_path: Path, name: str, damage: str) -> None:
    prefixes = write_even_and_odd(tmp_path)
    expected = samples(build(10, data_path=prefixes, split="1,0,0").train)
    (path,) = (path for path in caches(tmp_path) if path.name.endswith(f"-train-{name}.npy"))
    damaged = DAMAGE[damage](np.load(path).astype(np.int64))
    np.save(path, damaged)
    assert samples(build(10, data_path=prefixes, split="1,0,0").train) == expected


def test_a_cut_cache_is_made_again_and_a_whole_one_is_kept(prefix: str, tmp_path: Path) -> None:
    expected = samples(one(prefix))
    written = [path.stat().st_mtime_ns for path in caches(tmp_path)]
    one(prefix)
    assert [path.stat().st_mtime_ns for path in caches(tmp_path)] == written
    for path in caches(tmp_path):
        path.write_bytes(path.read_bytes()[:-8])
    assert samples(one(prefix)) == expected
    assert [path.name for path in (tmp_path / "cache").rglob(".*")] == [], "no temporary file may stay"


def test_a_cache_that_cannot_be_written_costs_memory_not_the_run(prefix: str, tmp_path: Path) -> None:
    expected = samples(one(prefix))
    for path in caches(tmp_path):
        path.unlink()
        path.mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert samples(one(prefix)) == expected
    assert any("index caches cannot be written" in str(warning.message) for warning in caught)


@pytest.mark.fault("L7")
def test_a_padding_token_in_a_packed_run_is_trained_like_any_other(tmp_path: Path) -> None:
    prefix = write_indexed(tmp_path / "data", [[5, 9, 7, 8] * 50])
    train = build(4, data_path=[prefix], split="1,0,0", tokenizer=PlainTokenizer(pad=9)).train
    for i in range(4):
        assert set(whole(train[i])) == {5, 7, 8, 9}
        assert train[i]["loss_mask"].tolist() == [1.0] * SEQ
