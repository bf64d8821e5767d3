"""Parquet as a corpus: columns, row groups, damage."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_crnet.data.corpus import read_chunks
from megatron_crnet.data.corpus_files import list_files
from megatron_crnet.data.preprocess import preprocess
from megatron_crnet.utils.errors import DataError
from tests.unit.data_helpers import TEXTS, read, train_small_tokenizer, write_jsonl, write_parquet


def test_parquet_is_read_in_order_over_row_groups(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(5000)]
    path = write_parquet(
        tmp_path / "a.parquet", [{"id": i, "text": t} for i, t in enumerate(texts)], row_group_size=700
    )
    assert read(path) == (texts, [])
    chunks = list(read_chunks(list_files([path]), 10_000))
    assert len(chunks) > 3
    assert sum(chunk.input_bytes for chunk in chunks) == path.stat().st_size
    (tmp_path / "copy").write_bytes(path.read_bytes())
    assert read(tmp_path / "copy") == (texts, []), "known by its first bytes"


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"data": {"text": "a", "other": "b"}}, "data.text"),
        ({"data": {"deep": {"text": "a"}}}, "data.deep.text"),
        ({"data.text": "a", "data": {"text": "nested"}}, "data.text"),
        ({"data.text": "a"}, "data.text"),
        ({"text": b"a"}, "text"),
    ],
)
def test_text_columns_of_parquet(tmp_path: Path, row: dict[str, object], key: str) -> None:
    assert read(write_parquet(tmp_path / "a.parquet", [row]), text_key=key) == (["a"], [])


def test_dictionaries_and_large_strings_of_parquet(tmp_path: Path) -> None:
    columns = {"text": pa.array(TEXTS).dictionary_encode(), "large": pa.array(TEXTS, pa.large_string())}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (TEXTS, [])
    assert read(tmp_path / "a.parquet", text_key="large") == (TEXTS, [])


def test_rows_of_parquet_without_text_are_named(tmp_path: Path) -> None:
    column = pa.array([b"a", None, b"\xff", b" ", b"b"])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": column[:0]}), tmp_path / "none.parquet")
    documents, summary = read(tmp_path)
    assert documents == ["a", "b"]
    assert summary[1:] == [
        f"  {tmp_path}/a.parquet: 1 without the text key (first at 2), 1 not UTF-8 (first at 3), 1 empty (first at 4)",
        f"  {tmp_path}/none.parquet: 1 empty",
    ]
    with pytest.raises(DataError, match=r"a\.parquet:2 has no text"):
        read(tmp_path / "a.parquet", strict=True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"content": "a", "id": 1}, "has no column 'text', but content, id"),
        ({"text": 5}, "has int64 in the column 'text', not text"),
        ({"text": ["a"]}, r"has list<.* in the column 'text', not text"),
    ],
)
def test_parquet_without_a_text_column_is_refused_before_any_work(
    tmp_path: Path, row: dict[str, object], message: str
) -> None:
    write_parquet(tmp_path / "a.parquet", [row])
    with pytest.raises(DataError, match=message):
        list_files([tmp_path])


@pytest.mark.parametrize("damage", ["cut", "garbage", "a page"])
def test_damaged_parquet_is_an_error(tmp_path: Path, damage: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": os.urandom(40).hex()} for _ in range(3000)])
    content = path.read_bytes()
    page = bytes(b ^ 0xFF for b in content[4:40])
    changed = {"cut": content[:-100], "garbage": b"garbage", "a page": content[:4] + page + content[40:]}
    path.write_bytes(changed[damage])
    with pytest.raises(DataError, match=r"a\.parquet is truncated or damaged, or not Parquet"):
        read(path)


def test_missing_pyarrow_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        read(tmp_path / "a.parquet")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_parquet_and_json_lines_give_the_same_tokens(model: str, tmp_path: Path) -> None:
    texts = [f"def f{i}(): return {i}" for i in range(3000)]
    write_parquet(tmp_path / "a.parquet", [{"data": {"text": text}} for text in texts])
    write_jsonl(tmp_path / "a.jsonl", texts)
    for name, key, workers in (("a.parquet", "data.text", 2), ("a.jsonl", "text", 0)):
        prefix = tmp_path / name.partition(".")[2]
        preprocess([tmp_path / name], prefix, "sentencepiece", model, workers=workers, text_key=key)
    assert (tmp_path / "parquet.bin").read_bytes() == (tmp_path / "jsonl.bin").read_bytes()
