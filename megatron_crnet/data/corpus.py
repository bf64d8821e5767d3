"""Reads documents from files and folders, in two steps that different processes can take.

`read_chunks` opens and decompresses files in a fixed order and hands out chunks of raw bytes;
`chunk_documents` decodes one chunk. A `.json`, `.jsonl` or `.ndjson` file holds one JSON object a line
(C4's layout), a `.parquet` file one document in each row; any other file is one document. What is left out is
counted by file and reason.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_crnet.data.corpus_files import BOM, Format, InputFile, Listing, list_files
from megatron_crnet.data.corpus_stats import CorpusStats, Kind
from megatron_crnet.data.decompression import DamagedError, decompressed
from megatron_crnet.data.parquet import parquet_texts
from megatron_crnet.utils.errors import DataError
from megatron_crnet.utils.progress import Progress

CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class LineChunk:
    """Whole lines of one JSON-lines file."""

    source: str
    first_line: int
    data: bytes
    input_bytes: int
    """Bytes of the file, as it lies on disk, read for this chunk."""


@dataclass(frozen=True)
class FileChunk:
    """Whole text files: names and contents."""

    sources: tuple[str, ...]
    contents: tuple[bytes, ...]
    input_bytes: int


@dataclass(frozen=True)
class RowChunk:
    """Rows of one Parquet file."""

    source: str
    first_row: int
    texts: tuple[bytes | None, ...]
    input_bytes: int


Chunk = LineChunk | FileChunk | RowChunk


@dataclass(frozen=True)
class Rules:
    """How files become documents."""

    text_key: str = "text"
    """Key of the text in a JSON object, or the column in a Parquet file; `data.text` is the key text in the object
    data, unless there is a key that holds the dot."""
    strict: bool = False
    """Refuse the first unreadable line or file, and broken links, instead of counting them."""
    format: Format | None = None
    """How every file is read; None goes by the suffix."""


_Decoded = Iterator[tuple[str, int, str, int]]
"""Text, its UTF-8 size, its file, and its line or row there, from 1 on, or 0 for a whole file."""


def iter_documents(
    paths: Iterable[str | Path],
    text_key: str = "text",
    strict: bool = False,
    stats: CorpusStats | None = None,
    file_format: Format | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[str]:
    """Yield the text of every document of `paths` in a fixed order, counting into `stats`.

    Args:
        text_key, strict, file_format: see Rules.
        progress: called before the first chunk and after every one.

    Raises:
        DataError: a path is missing or damaged; with `strict`, a line or file that cannot be decoded.
    """
    stats = CorpusStats() if stats is None else stats
    rules = Rules(text_key, strict, file_format)
    listing = open_corpus(paths, rules, stats)
    started, input_bytes = time.monotonic(), 0

    def report() -> None:
        if progress is not None:
            files, total, seconds = len(listing.files), listing.total_bytes, time.monotonic() - started
            progress(Progress(stats.documents, stats.text_bytes, 0, input_bytes, total, files, seconds))

    report()
    for chunk in read_chunks(listing.files, text_key=text_key):
        yield from chunk_documents(chunk, rules, stats)
        input_bytes += chunk.input_bytes
        report()


def open_corpus(paths: Iterable[str | Path], rules: Rules, stats: CorpusStats) -> Listing:
    """The files of `paths`; what of folders is none of them is noted in `stats`.

    Raises:
        DataError: a path is missing, or a file cannot be read.
    """
    listing = list_files(paths, rules.text_key, rules.format, rules.strict)
    stats.passed_over += listing.passed_over
    stats.remarks += listing.remarks
    return listing


def read_chunks(files: Iterable[InputFile], chunk_bytes: int = CHUNK_BYTES, text_key: str = "text") -> Iterator[Chunk]:
    """Read and decompress `files` into chunks of about `chunk_bytes`, in order.

    Raises:
        DataError: a file cannot be read, or its compression is damaged.
    """
    for kind, group in itertools.groupby(files, key=lambda file: file.format):
        if kind == "text":
            yield from _file_chunks(group, chunk_bytes)
            continue
        for file in group:
            yield from _line_chunks(file, chunk_bytes) if kind == "jsonl" else _row_chunks(file, chunk_bytes, text_key)


def chunk_documents(chunk: Chunk, rules: Rules, stats: CorpusStats) -> list[str]:
    """Decode the texts of one chunk, counting into `stats`.

    Raises:
        DataError: with `rules.strict`, naming file and line of what cannot be decoded.
    """
    texts = []
    for text, size, source, place in _decoded(chunk, rules, stats):
        if text and not text.isspace():
            texts.append(text)
            stats.text_bytes += size
        else:
            stats.skip(source, "empty", place)
    stats.documents += len(texts)
    return texts


def chunk_places(chunk: Chunk, rules: Rules) -> list[tuple[str, int]]:
    """File and place of each text of `chunk_documents`, by decoding the chunk again.

    Few are asked for: kept beside every text they would slow short documents down.
    """
    found = _decoded(chunk, rules, CorpusStats())
    return [(source, place) for text, _, source, place in found if text and not text.isspace()]


def _decoded(chunk: Chunk, rules: Rules, stats: CorpusStats) -> _Decoded:
    if isinstance(chunk, LineChunk):
        return _decode_lines(chunk, rules, stats)
    if isinstance(chunk, RowChunk):
        return _decode_rows(chunk, rules, stats)
    return _decode_files(chunk, rules, stats)


def _decode_lines(chunk: LineChunk, rules: Rules, stats: CorpusStats) -> _Decoded:
    source = chunk.source
    if not chunk.data:
        stats.skip(source, "empty", 0)
        return
    marked = BOM in chunk.data
    names = {rules.text_key, *rules.text_key.split(".")}
    decode = json.JSONDecoder(object_pairs_hook=partial(_refuse_two, names)).decode
    for number, line in enumerate(chunk.data.split(b"\n"), start=chunk.first_line):
        if marked:
            line = line.removeprefix(BOM)  # files that were joined may have one anywhere
        if not line or line.isspace():
            continue
        try:
            text = text_at(decode(line.decode()), rules.text_key)
            yield text, len(text.encode()), source, number
        except UnicodeError as error:
            _skip(stats, rules, "invalid_utf8", source, number, "is not valid UTF-8", error)
        except _TwoTextsError as error:
            _skip(stats, rules, "two_texts", source, number, f"has the key {rules.text_key!r} twice", error)
        except KeyError as error:
            _skip(stats, rules, "missing_text", source, number, f"has no key {rules.text_key!r}", error)
        except TypeError as error:
            what = f"has no string under the key {rules.text_key!r}"
            _skip(stats, rules, "not_text", source, number, what, error)
        except (ValueError, RecursionError) as error:
            _skip(stats, rules, "invalid_json", source, number, "is not a JSON object", error)


def _decode_files(chunk: FileChunk, rules: Rules, stats: CorpusStats) -> _Decoded:
    for source, content in zip(chunk.sources, chunk.contents, strict=True):
        content = content.removeprefix(BOM)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            _skip(stats, rules, "invalid_utf8", source, 0, "is not valid UTF-8", error, line)
        else:
            yield text, len(content), source, 0


def _decode_rows(chunk: RowChunk, rules: Rules, stats: CorpusStats) -> _Decoded:
    if not chunk.texts:
        stats.skip(chunk.source, "empty", 0)
    for row, value in enumerate(chunk.texts, start=chunk.first_row):
        if value is None:
            what = f"has no text under the key {rules.text_key!r}"
            _skip(stats, rules, "missing_text", chunk.source, row, what, KeyError(rules.text_key))
            continue
        try:
            text = value.decode()
        except UnicodeDecodeError as error:
            _skip(stats, rules, "invalid_utf8", chunk.source, row, "is not valid UTF-8", error)
        else:
            yield text, len(value), chunk.source, row


class _TwoTextsError(Exception):
    """An object with the text key, or a part of it, twice, of which JSON readers take the last without a word."""


def _refuse_two(names: set[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs) and any([key for key, _ in pairs].count(name) > 1 for name in names):
        raise _TwoTextsError
    return found


def text_at(value: Any, key: str) -> str:
    """The string under `key`; `a.b` is the key b in the object under a, unless there is a key "a.b".

    Raises:
        ValueError: `value` is not an object.
        KeyError: it has no such key.
        TypeError: what is there is not a string.
    """
    if not isinstance(value, dict):
        raise ValueError("not an object")
    for part in (key,) if key in value else key.split("."):
        if not isinstance(value, dict):
            raise KeyError(key)
        value = value[part]
    if not isinstance(value, str):
        raise TypeError(key)
    return value


def _skip(
    stats: CorpusStats,
    rules: Rules,
    kind: Kind,
    source: str,
    place: int,
    what: str,
    error: Exception,
    line: int | None = None,
) -> None:
    """Count a document that cannot be decoded, or refuse it.

    Args:
        line: where in a file that is one document.
    """
    if rules.strict:
        where = f"{source}:{line or place}"
        raise DataError(f"{where} {what}: repair it, or leave out --strict to skip it") from error
    stats.skip(source, kind, place)


def _file_chunks(files: Iterable[InputFile], chunk_bytes: int) -> Iterator[FileChunk]:
    """Gather small files until they are worth a chunk."""
    sources: list[str] = []
    contents: list[bytes] = []
    consumed = size = 0
    for file in files:
        blocks = list(_read_blocks(file, 1 << 20))
        sources.append(file.name)
        contents.append(b"".join(block for block, _ in blocks))
        consumed += sum(block_consumed for _, block_consumed in blocks)
        size += len(contents[-1])
        if size >= chunk_bytes:
            yield FileChunk(tuple(sources), tuple(contents), consumed)
            sources, contents, consumed, size = [], [], 0, 0
    if sources:
        yield FileChunk(tuple(sources), tuple(contents), consumed)


def _line_chunks(file: InputFile, chunk_bytes: int) -> Iterator[LineChunk]:
    """Cut a file at the last line end of each block; a file without any gives an empty chunk."""
    line, consumed, empty = 1, 0, True
    parts: list[bytes] = []
    for block, block_consumed in _read_blocks(file, chunk_bytes):
        consumed += block_consumed
        cut = block.rfind(b"\n") + 1
        if not cut:
            parts.append(block)
            continue
        data = b"".join([*parts, block[:cut]])
        yield LineChunk(file.name, line, data, consumed)
        line, consumed, parts, empty = line + data.count(b"\n"), 0, [block[cut:]], False
    if (data := b"".join(parts)) or empty:
        yield LineChunk(file.name, line, data, consumed)


def _row_chunks(file: InputFile, chunk_bytes: int, text_key: str) -> Iterator[RowChunk]:
    """Gather rows until they are worth a chunk; a file without any gives an empty chunk."""
    texts: list[bytes | None] = []
    first, size = 0, 0
    rows, batches = parquet_texts(file.path, text_key)

    def chunk() -> RowChunk:
        start, end = ((file.size or 0) * row // max(rows, 1) for row in (first, first + len(texts)))
        return RowChunk(file.name, first + 1, tuple(texts), end - start)

    for text in itertools.chain.from_iterable(batches):
        texts.append(text)
        size += len(text or b"")
        if size >= chunk_bytes:
            yield chunk()
            first, size, texts = first + len(texts), 0, []
    if texts or not first:
        yield chunk()


def _read_blocks(file: InputFile, size: int) -> Iterator[tuple[bytes, int]]:
    """Decompressed blocks of a file, each with the number of bytes read from disk for it."""
    read = 0
    try:
        with file.open() as raw:
            for block, consumed in decompressed(raw, file.compression, size):
                read += consumed
                yield block, consumed
    except DamagedError as error:
        raise DataError(f"{file.name} is truncated or damaged ({error}): fetch it again") from error
    except OSError as error:
        raise DataError(
            f"{file.name} cannot be read ({error.strerror or error}): correct path or permissions"
        ) from error
    if file.size is not None and read != file.size:
        raise DataError(
            f"{file.name} had {file.size} bytes and {read} when it was read: wait until nobody writes to it"
        )
