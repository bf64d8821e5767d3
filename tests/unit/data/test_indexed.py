"""What is refused before anything is built, and how blends and splits are read."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_crnet.data.indexed import INDEX_HEADER, SCAN_BYTES, parse_blend, parse_split, read_index
from megatron_crnet.hf.evaluate import indexed_documents
from megatron_crnet.utils.errors import ConfigError, DataError
from tests.unit.data_helpers import (
    SEQ,
    VOCAB,
    PlainTokenizer,
    build,
    random_documents,
    write_indexed,
)


def break_file(path: str, how: str) -> None:
    content = Path(path).read_bytes()
    if how == "missing":
        Path(path).unlink()
    else:
        changed = {"cut": content[:-2], "longer": content + b"\0\0", "empty": b"", "garbage": b"x" * len(content)}
        Path(path).write_bytes(changed[how])


@pytest.mark.parametrize(
    ("suffix", "how", "message"),
    [
        ("bin", "missing", r"data\.bin does not exist"),
        ("idx", "missing", r"data\.idx does not exist"),
        ("bin", "cut", r"data\.bin has \d+ bytes, but its index describes"),
        ("bin", "longer", r"data\.bin has \d+ bytes, but its index describes"),
        ("bin", "empty", r"data\.bin has 0 bytes, but its index describes"),
        ("idx", "cut", r"data\.idx has \d+ bytes, but its 200 documents need"),
        ("idx", "longer", r"data\.idx has \d+ bytes, but its 200 documents need"),
        ("idx", "empty", r"data\.idx is not a Megatron index"),
        ("idx", "garbage", r"data\.idx is not a Megatron index"),
    ],
)
def test_broken_files(prefix: str, suffix: str, how: str, message: str) -> None:
    break_file(f"{prefix}.{suffix}", how)
    with pytest.raises(DataError, match=message) as caught:
        build(10, data_path=[prefix])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_for_a_prefix_is_answered_with_the_prefix(prefix: str, suffix: str) -> None:
    with pytest.raises(DataError, match=f"does not exist: .* or give the prefix {prefix}, without {suffix}"):
        build(10, data_path=[prefix + suffix])


def test_index_of_another_run_or_another_kind(prefix: str, tmp_path: Path) -> None:
    other = write_indexed(tmp_path / "other", random_documents(200, VOCAB, seed=9))
    shutil.copy(f"{other}.idx", f"{prefix}.idx")
    with pytest.raises(DataError, match="of another run"):
        read_index(prefix)
    content = bytearray(Path(f"{other}.idx").read_bytes())
    for position, value in ((9, 2), (17, 6), (17, 99)):  # version 2, float64, no such dtype
        changed = bytes([*content[:position], value, *content[position + 1 :]])
        Path(f"{other}.idx").write_bytes(changed)
        with pytest.raises(DataError, match="not a Megatron index"):
            read_index(other)


def test_index_whose_last_document_ends_elsewhere(prefix: str) -> None:
    content = Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.idx").write_bytes(content[:-8] + (199).to_bytes(8, "little"))
    with pytest.raises(DataError, match="cut or of another run"):
        read_index(prefix)


def damaged_index(prefix: str, field: str, number: int, value: int) -> None:
    """Writes one number into the .idx: a length, a pointer or a boundary."""
    count = read_index(prefix).documents
    start, dtype = {"length": (0, np.int32), "pointer": (4 * count, np.int64), "boundary": (12 * count, np.int64)}[
        field
    ]
    width = np.dtype(dtype).itemsize
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    place = INDEX_HEADER.size + start + number * width
    content[place : place + width] = np.array([value], dtype).tobytes()
    Path(f"{prefix}.idx").write_bytes(content)


@pytest.mark.fault("F8")
@pytest.mark.parametrize("at_once", [7, 1 << 20])
@pytest.mark.parametrize(
    ("field", "number", "value"),
    [
        ("pointer", 5, 10**12),
        ("pointer", 5, -2),
        ("pointer", 7, 0),
        ("length", 5, 2**31 - 1),
        ("length", 6, -1),
        ("length", 0, 0),
        ("boundary", 5, 10**12),
        ("boundary", 199, 0),
    ],
)
def test_an_index_damaged_in_the_middle_is_refused(
    prefix: str, monkeypatch: pytest.MonkeyPatch, field: str, number: int, value: int, at_once: int
) -> None:
    monkeypatch.setattr("megatron_crnet.data.indexed.CHECKED_AT_ONCE", at_once)
    damaged_index(prefix, field, number, value)
    with pytest.raises(DataError, match=r"data\.idx .*damaged, preprocess again"):
        build(10, data_path=[prefix])
    with pytest.raises(DataError, match=r"data\.idx .*damaged, preprocess again"):
        indexed_documents(prefix, PlainTokenizer(VOCAB))


@pytest.mark.fault("F8")
def test_any_changed_byte_of_an_index_is_refused_or_changes_nothing(prefix: str) -> None:
    generator, whole = np.random.default_rng(8), Path(f"{prefix}.idx").read_bytes()
    documents = [ids.tolist() for ids in indexed_documents(prefix, PlainTokenizer(VOCAB))]
    for _ in range(150):
        content = bytearray(whole)
        content[generator.integers(len(whole))] ^= int(generator.integers(1, 256))
        Path(f"{prefix}.idx").write_bytes(content)
        with suppress(DataError):  # boundaries, which only other programs look at, may go up early
            assert [ids.tolist() for ids in indexed_documents(prefix, PlainTokenizer(VOCAB))] == documents


@pytest.mark.fault("F8")
def test_an_index_of_multimodal_data_is_refused_by_name(prefix: str) -> None:
    with open(f"{prefix}.idx", "ab") as stream:
        stream.write(bytes(200))
    with pytest.raises(DataError, match="holds modes, as multimodal data does"):
        build(10, data_path=[prefix])


def test_index_without_documents(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no document"):
        read_index(write_indexed(tmp_path / "none", []))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("where", [0, 199])
def test_ids_beyond_the_tokenizer(tmp_path: Path, documents: list[list[int]], dtype: Any, where: int) -> None:
    changed = [list(document) for document in documents]
    changed[where][0] = VOCAB
    prefix = write_indexed(tmp_path / "data", changed, dtype)
    with pytest.raises(DataError, match=f"token id {VOCAB}, but the tokenizer has the ids 0 to {VOCAB - 1}"):
        build(10, data_path=[prefix])


def test_ids_are_searched_in_a_part_of_a_large_file(tmp_path: Path) -> None:
    count = SCAN_BYTES // 2 + 1000
    prefix = write_indexed(tmp_path / "large", [np.full(count, 5), np.full(10, 6)])  # type: ignore[list-item]
    assert len(build(10, data_path=[prefix], split="1,0,0").train) >= 10
    ids = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r+")
    ids[count // 2 :] = VOCAB
    ids.flush()
    with pytest.raises(DataError, match=f"token id {VOCAB}"):
        build(10, data_path=[prefix], split="1,0,0")


def test_negative_ids(tmp_path: Path) -> None:
    prefix = write_indexed(tmp_path / "data", [[5, -1, 7] * 10], np.int32)
    with pytest.raises(DataError, match="token id -1"):
        build(10, data_path=[prefix])


def test_model_smaller_than_the_tokenizer(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"set model\.vocab_size to 256"):
        build(10, data_path=[prefix], tokenizer=PlainTokenizer(VOCAB + 1))


def test_split_too_small_for_a_sample(tmp_path: Path) -> None:
    prefix = write_indexed(tmp_path / "data", [[5] * 8, [6] * SEQ])
    with pytest.raises(
        DataError, match=f"train split of .* has 8 tokens in 1 documents, but one sample needs {SEQ + 1}"
    ):
        build(10, data_path=[prefix], split="1,1,0")
    with pytest.raises(DataError, match=r"valid split of .* has 0 tokens in 0 documents"):
        build(10, 10, data_path=[prefix], split="99,1,0", sample_format="padded")
    assert len(build(10, data_path=[prefix], split="1,0,0").train) >= 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"data\.data_path is empty"),
        ({"data_path": ["a"], "valid_data_path": ["b"]}, r"data\.data_path and data\.valid_data_path are both set"),
        ({"train_data_path": ["a"]}, r"10 valid samples are wanted, .* set data\.valid_data_path"),
        ({"data_path": ["a"], "split": "1,0,0"}, r"10 valid samples are wanted"),
        ({"data_path": [0.5, "a", "b"]}, "mixes weights and prefixes"),
        ({"data_path": [0.5, "a", "b", "c"]}, "mixes weights and prefixes"),
        ({"data_path": [0.5, "a", 0.5]}, "mixes weights and prefixes"),
        ({"data_path": [2023, 2024]}, r"mixes weights and prefixes .*a prefix that is a number as \./2024"),
        ({"data_path": ["a"], "split": "0,0,0"}, r"data\.split is '0,0,0'"),
        ({"data_path": ["a"], "split": "90,10,1,1"}, r"data\.split"),
        ({"data_path": ["a"], "split": "90,-1,1"}, r"data\.split"),
        ({"data_path": ["a"], "split": "9e1,1,1"}, r"data\.split"),
        ({"data_path": ["a"], "split": "most"}, r"data\.split"),
    ],
)
def test_contradictory_data_sections(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(10, 10, **data)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("B17")
@pytest.mark.parametrize("entries", [["2023", "2024"], ["0.5", "a", "0.5", "b"], ["nan", "a"], ["2024"]])
def test_a_quoted_number_is_neither_weight_nor_prefix_until_it_says_which(entries: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"write {entries[0]} without quotes for a weight, \./{entries[0]} for a"):
        parse_blend(entries, "data.data_path")


def test_blend_and_split_are_read_as_written() -> None:
    assert parse_blend(["a", "b", "c"], "k").prefixes == ["a", "b", "c"]
    assert parse_blend(["a", "b"], "k").weights is None
    assert parse_blend(["./2023", "./2024"], "k").prefixes == ["./2023", "./2024"]
    assert parse_blend([30.0, "a", 70.0, "b"], "k").weights == [30.0, 70.0]
    assert parse_blend([1.0, "a"], "k").prefixes == ["a"]
    assert parse_split("3, 1") == [(0, 0.75), (0.75, 1.0), None]


def test_cache_folder_that_cannot_be_written(prefix: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"set data\.cache_path"):
        build(10, data_path=[prefix], split="1,0,0", cache_path=str(tmp_path / "file"))
