"""Reading text: order, compression, what is skipped, and the standard library as a corpus."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard

from megatron_crnet.data.corpus import iter_documents, read_chunks
from megatron_crnet.data.corpus_files import list_files
from megatron_crnet.data.corpus_stats import CorpusStats, Skipped
from megatron_crnet.data.standard_library import split_files, standard_library_files, write_corpus
from megatron_crnet.utils.errors import ConfigError, DataError
from tests.unit.data_helpers import write_jsonl

TEXTS = ["first", "second\nwith two lines", "dritter Text: äöü 漢字", "x" * 5000, "last"]


def test_json_lines_plain_and_compressed_give_the_same(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    zstd = zstandard.ZstdCompressor()
    files = {
        "c4-train.00000-of-01024.json": data,
        "a.json.gz": gzip.compress(data),
        "two-members.json.gz": gzip.compress(data[:100]) + gzip.compress(data[100:]),
        "a.jsonl.zst": zstd.compress(data),
        "two-frames.jsonl.zst": zstd.compress(data[:100]) + zstd.compress(data[100:]),
        "no-newline-at-end.ndjson": data.rstrip(b"\n"),
        "windows.jsonl": data.replace(b"\n", b"\r\n"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert list(iter_documents([tmp_path / name])) == TEXTS, name


def test_other_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.py").write_text("import this\n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "d").write_text('{"other": "not JSON lines"}')
    assert list(iter_documents([tmp_path])) == ["one\ntwo\n", "import this\n", "three", '{"other": "not JSON lines"}']


def test_order_is_that_of_the_arguments_and_of_sorted_names_within_a_folder(tmp_path: Path) -> None:
    for name in ("b/1.txt", "b/0.txt", "b.txt", "a/z/0.txt", ".hidden", ".git/x.txt"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(name)
    write_jsonl(tmp_path / "folder" / "a" / "lines.jsonl", ["a line"])
    (tmp_path / "first.txt").write_text("first")
    expected = ["first", "a line", "a/z/0.txt", "b.txt", "b/0.txt", "b/1.txt", "first"]
    arguments = [tmp_path / "first.txt", tmp_path / "folder", tmp_path / "first.txt"]
    assert list(iter_documents(arguments)) == expected


def bad_lines(path: Path) -> Path:
    path.write_bytes(
        b'{"text": "good"}\n'
        b'{"text": "\xff"}\n'
        b"\n"
        b'{"text": "half a pair \\ud800"}\n'
        b'{"text": "cut\n'
        b'["text"]\n'
        b'{"body": "other key"}\n'
        b'{"text": null}\n'
        b'{"text": ""}\n'
        b'{"text": " \\n"}\n' + b"[" * 100_000 + b"\n"
        b'{"text": "goo\xcc\x88d"}\n'
    )
    return path


def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    stats = CorpusStats()
    assert list(iter_documents([bad_lines(tmp_path / "bad.jsonl")], stats=stats)) == ["good", "goo\u0308d"]
    source = str(tmp_path / "bad.jsonl")
    skipped = {
        (source, "invalid_utf8"): Skipped(2, 2),
        (source, "invalid_json"): Skipped(3, 5),
        (source, "missing_text"): Skipped(1, 7),
        (source, "not_text"): Skipped(1, 8),
        (source, "empty"): Skipped(2, 9),
    }
    assert stats == CorpusStats(documents=2, text_bytes=4 + 6, by_file=skipped)  # type: ignore[arg-type]
    assert stats.skipped == 9


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "\xff"}', "not valid UTF-8"),
        (b'{"text": "\\ud800"}', "not valid UTF-8"),
        (b'{"text": ', "not a JSON object"),
        (b'{"body": 1}', "has no text under the key 'text'"),
        (b'{"text": 1}', "no string under the key 'text'"),
    ],
)
def test_strict_names_file_and_line(tmp_path: Path, line: bytes, what: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' * 3000 + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError, match=rf"bad\.jsonl:6001 .*{what}"):
        list(iter_documents([path], strict=True))


def test_text_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xe9\n")
    (tmp_path / "b.txt").write_bytes(b"good")
    stats = CorpusStats()
    assert list(iter_documents([tmp_path], stats=stats)) == ["good"]
    assert stats.count("invalid_utf8") == 1
    with pytest.raises(DataError, match=r"a\.txt:2 is not valid UTF-8"):
        list(iter_documents([tmp_path], strict=True))


def test_another_key(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "yes", "text": "no"}\n')
    assert list(iter_documents([path], text_key="content")) == ["yes"]


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_chunks_hold_whole_lines_and_know_their_number(tmp_path: Path, size: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    chunks = list(read_chunks(list_files([path]), size))
    assert b"".join(data or b"" for chunk in chunks for data in chunk.contents) == path.read_bytes()
    assert sum(chunk.input_bytes for chunk in chunks) == path.stat().st_size
    line = 1
    for chunk in chunks:
        (data,) = chunk.contents
        assert chunk.first == line
        assert data is not None
        assert data.endswith(b"\n")
        line += data.count(b"\n")


def test_small_files_travel_together(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i:02}.txt").write_text("x" * 100)
    chunks = list(read_chunks(list_files([tmp_path]), 1000))
    assert [len(chunk.contents) for chunk in chunks] == [10] * 10


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_compression_is_an_error(tmp_path: Path, name: str, damage: str) -> None:
    data = b"".join(json.dumps({"text": os.urandom(50).hex()}).encode() + b"\n" for _ in range(3000))
    data = data if "jsonl" in name else data.replace(b"{", b"(")
    packed = gzip.compress(data) if name.endswith("gz") else zstandard.ZstdCompressor().compress(data)
    (tmp_path / name).write_bytes(packed[:-1000] if damage == "cut" else b"garbage" + packed)
    with pytest.raises(DataError, match=f"{name} is truncated or damaged"):
        list(iter_documents([tmp_path / name]))


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a file nor a folder"):
        list(iter_documents([tmp_path / "nowhere"]))


def test_standard_library_is_large_enough_sorted_and_without_tests() -> None:
    files = standard_library_files()
    assert [*files] == sorted(files)
    assert sum(path.stat().st_size for path in files.values()) >= 10_000_000
    assert {"argparse.py", "json/decoder.py"} <= set(files)
    folders = {part for name in files for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "__pycache__"}


def small_library(root: Path) -> Path:
    for name in (
        "b.py",
        "a/x.py",
        "test/t.py",
        "a/tests/u.py",
        "idlelib/idle_test/v.py",
        "site-packages/n.py",
        "c.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("#" * 100)
    return root


def test_standard_library_takes_tests_only_when_needed(tmp_path: Path) -> None:
    root = small_library(tmp_path)
    assert [*standard_library_files(root, 200)] == ["a/x.py", "b.py"]
    assert [*standard_library_files(root, 201)] == [
        "a/tests/u.py",
        "a/x.py",
        "b.py",
        "idlelib/idle_test/v.py",
        "test/t.py",
    ]
    with pytest.raises(DataError, match=r"500 bytes of \.py files, but 501 are needed"):
        standard_library_files(root, 501)


def test_split_depends_on_names_alone(tmp_path: Path) -> None:
    files = {f"{i}.py": tmp_path for i in range(1000)}
    train, valid = split_files(files, 0.1)
    assert {**train, **valid} == files
    assert len(train) + len(valid) == 1000
    assert 70 < len(valid) < 130
    fewer_train, fewer_valid = split_files({f"{i}.py": tmp_path for i in range(0, 1000, 3)}, 0.1)
    assert set(fewer_train) < set(train)
    assert set(fewer_valid) < set(valid)


@pytest.mark.parametrize("fraction", [0, 1, -0.5])
def test_split_refuses_a_fraction_out_of_range(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split_files({"a": tmp_path}, fraction)


def test_split_refuses_an_empty_side(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="each needs one"):
        split_files({"a": tmp_path}, 0.5)


def corpus_files(root: Path, count: int = 20) -> dict[str, Path]:
    root.mkdir(exist_ok=True)
    files = {f"{i}.py": root / f"{i}.py" for i in range(count)}
    for name, path in files.items():
        path.write_text(f"# {name}\n")
    return files


def test_corpus_is_written_once(tmp_path: Path) -> None:
    files, folder = corpus_files(tmp_path / "library"), tmp_path / "corpus"
    (tmp_path / "library" / "0.py").write_bytes(b"\xff")
    assert write_corpus(folder, 0.3, files).endswith("; left out 1 that are not UTF-8: 0.py")
    train, valid = (list(iter_documents([folder / name])) for name in ("train.jsonl", "valid.jsonl"))
    assert sorted(train + valid) == sorted(f"# {name}\n" for name in files if name != "0.py")
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(written) == {"train.jsonl", "valid.jsonl", "corpus.json"}
    assert "already there" in write_corpus(folder, 0.3, files)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def test_corpus_is_written_again_when_it_is_not_the_same(tmp_path: Path) -> None:
    files, folder = corpus_files(tmp_path / "library"), tmp_path / "corpus"
    write_corpus(folder, 0.3, files)
    whole = (folder / "train.jsonl").read_bytes()
    (folder / "train.jsonl").write_bytes(whole[:-1])
    assert "already there" not in write_corpus(folder, 0.3, files)
    assert (folder / "train.jsonl").read_bytes() == whole
    (tmp_path / "library" / "1.py").write_text("# other\n")
    assert "already there" not in write_corpus(folder, 0.3, files)
    assert "# other\n" in iter_documents([folder / "train.jsonl", folder / "valid.jsonl"])


def test_corpus_leaves_foreign_files_alone(tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").write_text("mine")
    with pytest.raises(DataError, match="exists already and is not of this command: choose another folder"):
        write_corpus(tmp_path, 0.3, corpus_files(tmp_path / "library"))
    assert (tmp_path / "valid.jsonl").read_text() == "mine"
    assert not (tmp_path / "train.jsonl").exists()
