"""Which files are read, and how: every form is read or refused by name, and what is left out is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_crnet.data.corpus import read_chunks
from megatron_crnet.data.corpus_files import Format, list_files
from megatron_crnet.utils.errors import DataError
from tests.unit.data_helpers import TEXTS, give_standard_input, lines, read, write_jsonl, write_parquet

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"


def long_zstd(data: bytes, window_log: int) -> bytes:
    """What `zstd --ultra --long=WINDOW_LOG` writes of a stream."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(data) + stream.flush()


def skippable(data: bytes) -> bytes:
    """A frame of zstd that pzstd writes before its data."""
    return b"\x50\x2a\x4d\x18\x04\0\0\0size" + zstandard.ZstdCompressor().compress(data)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor().compress,
    "zstd": skippable,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}


@pytest.mark.fault("D3")
@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_every_compression_is_read_in_one_member_and_in_several(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESSIONS[suffix]
    for name, content in (
        (f"one.jsonl.{suffix}", compress(lines())),
        (f"two.jsonl.{suffix}", compress(lines()[:20]) + compress(lines()[20:])),
        (f"UPPER.JSONL.{suffix.upper()}", compress(lines())),
        ("without-its-suffix.jsonl", compress(lines())),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert read(path) == (TEXTS, []), name
        assert sum(chunk.input_bytes for chunk in read_chunks(list_files([path]))) == len(content)


@pytest.mark.fault("D3")
@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("damage", ["cut", "garbage after it", "cut second member", "empty second member"])
def test_no_part_of_a_compressed_file_is_lost_in_silence(tmp_path: Path, suffix: str, damage: str) -> None:
    compress, path = COMPRESSIONS[suffix], tmp_path / f"a.jsonl.{suffix}"
    whole = compress(lines())
    ends = {
        "cut": whole[:-3],
        "garbage after it": whole + b"garbage",
        "cut second member": whole + whole[:-3],
        "empty second member": whole + compress(b""),
    }
    path.write_bytes(ends[damage])
    if damage == "empty second member":
        assert read(path) == (TEXTS, [])
    else:
        with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix} is truncated or damaged"):
            read(path)


@pytest.mark.fault("D4")
@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_long_windows_of_zstd_are_read(tmp_path: Path, window_log: int) -> None:
    packed = long_zstd(lines(), window_log)
    assert zstandard.get_frame_parameters(packed).window_size == 1 << window_log
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert read(tmp_path / "a.jsonl.zst") == (TEXTS, [])


@pytest.mark.fault("D1")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.xz"])
def test_a_byte_order_mark_costs_no_document(tmp_path: Path, name: str) -> None:
    data = b"\xef\xbb\xbf" + lines(TEXTS[:1]) + b"\xef\xbb\xbf" + lines([*TEXTS[1:], "\ufeff is kept"])
    (tmp_path / name).write_bytes(COMPRESSIONS.get(name.rpartition(".")[2], bytes)(data))
    assert read(tmp_path / name) == ([*TEXTS, "\ufeff is kept"], [])


@pytest.mark.fault("D1")
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    assert read(tmp_path / "a.txt") == (["text"], [])


@pytest.mark.fault("D1")
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
def test_other_encodings_are_refused_by_name(tmp_path: Path, name: str, encoding: str) -> None:
    text = ("" if encoding != "utf-16-be" else "\ufeff") + lines().decode()
    data = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(DataError, match=rf"{name} is not UTF-8 but UTF-16 or UTF-32"):
        read(tmp_path / name)


@pytest.mark.fault("D2")
@pytest.mark.parametrize("name", ["UPPER.JSONL", "Mixed.Json", "a.NDJSON"])
def test_suffixes_have_no_case(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(lines())
    assert read(tmp_path / name) == (TEXTS, [])


@pytest.mark.fault("D2")
@pytest.mark.parametrize("name", ["part-00000", "a.jsonl.1", "a.txt"])
def test_json_lines_under_another_name_are_refused_unless_a_format_is_given(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(lines())
    with pytest.raises(DataError, match=r"seems to hold JSON lines, .* say --format jsonl"):
        read(tmp_path / name)
    assert read(tmp_path / name, file_format="jsonl") == (TEXTS, [])
    assert read(tmp_path / name, file_format="text") == ([lines().decode()], [])


@pytest.mark.fault("D2")
@pytest.mark.parametrize("suffix", ["", *COMPRESSIONS])
def test_standard_input_is_read_in_the_format_that_is_given(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    give_standard_input(monkeypatch, COMPRESSIONS.get(suffix, bytes)(lines()))
    assert read(Path("-"), file_format="jsonl") == (TEXTS, [])


@pytest.mark.fault("D2")
@pytest.mark.parametrize("file_format", [None, "parquet"])
def test_standard_input_needs_a_format(monkeypatch: pytest.MonkeyPatch, file_format: Format | None) -> None:
    give_standard_input(monkeypatch, lines())
    with pytest.raises(DataError, match=r"standard input .* give --format jsonl or text"):
        read(Path("-"), file_format=file_format)
    with pytest.raises(DataError, match="given twice"):
        read(Path("-"), Path("-"), file_format="jsonl")


@pytest.mark.fault("D2")
@pytest.mark.parametrize("stdin", ["<&-", "0>/dev/null"])
def test_standard_input_that_cannot_be_read_is_one_line(stdin: str) -> None:
    code = "from megatron_crnet.data.corpus import iter_documents as i; list(i(['-'], file_format='text'))"
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{code}" {stdin}'], capture_output=True, text=True)
    said = "DataError: standard input (-) cannot be read (Bad file descriptor): give text by a pipe, or a file"
    assert done.stderr.splitlines()[-1] == f"megatron_crnet.utils.errors.{said}"


@pytest.mark.fault("D3")
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "A.ZIP", "a.lz4", "a.csv", "a.arrow", "a.jsonl.br"])
def test_what_is_not_text_is_refused_by_name_before_any_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "good.jsonl").write_bytes(lines())
    (tmp_path / name).write_bytes(gzip.compress(lines()) if name.endswith("gz") else lines())
    with pytest.raises(DataError, match=rf"{name} is (an archive|compressed|a table)"):
        list_files([tmp_path])


@pytest.mark.fault("D3")
@pytest.mark.parametrize("name", ["a.jsonl.snappy", "a.parquet.part", "a.json.enc"])
def test_a_shard_under_a_suffix_that_nobody_knows_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\x06\x00\x00sNaPpY" + bytes(range(256)))
    with pytest.raises(DataError, match=f"{name} is not text, and its last suffix says nothing"):
        list_files([tmp_path])


def test_what_spark_writes_beside_parquet_is_passed_over_and_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "part-0.parquet", [{"text": "a"}])
    pq.write_metadata(pa.schema({"text": pa.string()}), tmp_path / "_common_metadata")
    (tmp_path / "_SUCCESS").write_bytes(b"")
    documents, summary = read(tmp_path)
    assert documents == ["a"]
    names = ("_SUCCESS", "_common_metadata")
    assert summary == [f"passed over: {tmp_path}/{name} (holds no rows)" for name in names]


@pytest.mark.fault("D3")
def test_all_refused_files_are_named_or_counted(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.zip").write_bytes(b"PK")
    with pytest.raises(DataError) as caught:
        list_files([tmp_path])
    assert all(f"{i}.zip is an archive" in str(caught.value) for i in range(5))
    assert str(caught.value).endswith("; and 3 more files")


@pytest.mark.fault("D3")
def test_what_is_left_out_is_named_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines() + b'{"text": "\xff"}\nno JSON\n{"text": 5}\n{"text": null}\n{"x": 1}\n')
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_bytes(b" \n")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    documents, summary = read(tmp_path)
    assert documents == TEXTS
    where = str(tmp_path)
    assert summary == [
        "skipped 9: 3 empty, 2 not UTF-8, 1 not a JSON object, 1 without the text key, 2 whose text is not a string",
        f"  {where}/a.jsonl: 1 not UTF-8 (first at 4), 1 not a JSON object (first at 5), "
        "2 whose text is not a string (first at 6), 1 without the text key (first at 8)",
        f"  {where}/b.txt: 1 not UTF-8",
        f"  {where}/c.txt: 1 empty",
        f"  {where}/empty.jsonl: 1 empty",
        f"  {where}/empty.jsonl.gz: 1 empty",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}, {"text": "b"}]', "holds a JSON array, .* jq -c"),
        (b'\xef\xbb\xbf \n[\n{"text": "a"}\n]', "holds a JSON array"),
        (b'{\n  "text": "a"\n}\n', "holds an object over several lines"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_json_that_is_not_in_lines_is_refused_with_the_command(
    tmp_path: Path, content: bytes, message: str, suffix: str
) -> None:
    path = tmp_path / f"a.json{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(DataError, match=message):
        read(path)


@pytest.mark.fault("D5")
def test_linked_folders_are_followed_once_and_broken_links_are_named(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    (folder / "real").mkdir(parents=True)
    outside.mkdir()
    (folder / "real" / "a.txt").write_text("a")
    (outside / "b.txt").write_text("b")
    (outside / "back").symlink_to(folder)
    (folder / "again").symlink_to("real")
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    (folder / "itself").symlink_to("itself")
    (folder / "linked").symlink_to(outside)
    (folder / ".hidden").mkdir()
    documents, summary = read(folder)
    assert documents == ["b", "a"]
    assert sorted(summary) == sorted(
        [
            f"passed over: {folder}/.hidden (hidden)",
            f"passed over: {folder}/broken (a broken link to {tmp_path}/nowhere)",
            f"passed over: {folder}/itself (a broken link to itself)",
            f"passed over: {folder}/again (the same folder as {folder}/real)",
            f"passed over: {folder}/linked/back (the same folder as {folder})",
        ]
    )
    with pytest.raises(DataError, match=r"broken cannot be read"):
        read(folder, strict=True)


@pytest.mark.fault("D5")
def test_two_names_of_one_file_are_both_read_and_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    os.link(tmp_path / "a.txt", tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("a.txt")
    documents, summary = read(tmp_path)
    assert documents == ["a", "a", "a"]
    assert summary == [f"note: {tmp_path}/{x}.txt is the same file as {tmp_path}/a.txt; both were read" for x in "bc"]


@pytest.mark.fault("D5")
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", ["FIFO", "socket"])
def test_what_is_not_a_file_is_refused_and_nothing_waits_for_it(tmp_path: Path, kind: str, inside: bool) -> None:
    path = tmp_path / "odd.jsonl"
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    with pytest.raises(DataError, match=r"odd\.jsonl is a pipe, socket or device"):
        read(tmp_path if inside else path)
    with pytest.raises(DataError, match="/dev/null is a pipe, socket or device"):
        read(Path("/dev/null"))


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    files = list_files([path])
    with path.open("a") as stream:
        stream.write('{"text": "half')
    with pytest.raises(DataError, match=r"a\.jsonl had 55 bytes and 69 when it was read"):
        list(read_chunks(files))


@pytest.mark.parametrize(
    ("value", "key", "expected"),
    [
        ({"data": {"text": "a"}}, "data.text", "a"),
        ({"a": {"b": {"c": "a"}}}, "a.b.c", "a"),
        ({"data.text": "literal", "data": {"text": "nested"}}, "data.text", "literal"),
        ({"text": "a", "": "b"}, "", "b"),
        ({"data": ["text"]}, "data.text", None),
        ({"data": "text"}, "data.text", None),
        ({"data": {"text": {"text": "a"}}}, "data.text", None),
    ],
)
def test_nested_text_keys(tmp_path: Path, value: dict[str, object], key: str, expected: str | None) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(value))
    documents, summary = read(tmp_path / "a.jsonl", text_key=key)
    assert documents == ([] if expected is None else [expected])
    assert bool(summary) == (expected is None)


@pytest.mark.fault("L10")
@pytest.mark.parametrize(
    ("key", "wrap", "twice"),
    [
        ("text", "%s", '{"text": "a", "id": 1, "text": "b"}'),
        ("data.text", '{"data": %s}', '{"text": "a", "id": 1, "text": "b"}'),
        ("data.text", '{"data": %s}', '{"text": "a"}, "data": {"text": "b"}'),
    ],
)
def test_an_object_with_the_text_twice_is_named(tmp_path: Path, key: str, wrap: str, twice: str) -> None:
    once = '{"text": "c", "more": {"x": "text", "y": "\\"text\\""}}'
    (tmp_path / "a.jsonl").write_text(f"{wrap % twice}\n{wrap % once}\n")
    documents, summary = read(tmp_path / "a.jsonl", text_key=key)
    assert documents == ["c"]
    assert summary[1:] == [f"  {tmp_path}/a.jsonl: 1 with the text key twice (first at 1)"]
    with pytest.raises(DataError, match=rf"a\.jsonl:1 has the key '{key}' twice"):
        read(tmp_path / "a.jsonl", text_key=key, strict=True)
