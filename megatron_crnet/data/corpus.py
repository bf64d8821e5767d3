"""Reads documents from files and folders, in two steps that different processes can take.

`read_chunks` opens and decompresses files in a fixed order and yields chunks of raw bytes; `chunk_documents` decodes
one chunk. A `.json`, `.jsonl` or `.ndjson` file holds one JSON object per line (C4's layout), a `.parquet` file one
document per row; any other file is one document. Skipped documents are counted by file and reason.
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

from megatron_crnet.data.corpus_files import BOM, Format, InputFile, Rules, list_files, total_bytes
from megatron_crnet.data.corpus_stats import CorpusStats, Kind
from megatron_crnet.data.decompression import DamagedError, decompressed
from megatron_crnet.data.parquet import parquet_texts
from megatron_crnet.utils.errors import DataError
from megatron_crnet.utils.progress import Progress

CHUNK_BYTES = 1 << 18

Document = tuple[str, int, str, int]
"""Text, its UTF-8 size, its file, and its line or row there, from 1 on; 0 for a whole file."""


@dataclass(frozen=True)
class Chunk:
    """Whole lines of one JSON-lines file, rows of one Parquet file, or whole text files.

    Attributes:
        sources: names of the files; one per content for text files.
        contents: the lines joined; or one per row, None without text; or one per file. Empty for a file without any.
        input_bytes: bytes on disk that were read for this chunk.
        first: number of the first line or row, from 1 on.
    """

    format: Format
    sources: tuple[str, ...]
    contents: tuple[bytes | None, ...]
    input_bytes: int
    first: int = 0


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
    files = list_files(paths, rules, stats)
    started, input_bytes, total = time.monotonic(), 0, total_bytes(files)

    def report() -> None:
        if progress is not None:
            seconds = time.monotonic() - started
            progress(Progress(stats.documents, stats.text_bytes, 0, input_bytes, total, len(files), seconds))

    report()
    for chunk in read_chunks(files, text_key=text_key):
        yield from [document[0] for document in chunk_documents(chunk, rules, stats)]
        input_bytes += chunk.input_bytes
        report()


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


def _file_chunks(files: Iterable[InputFile], chunk_bytes: int) -> Iterator[Chunk]:
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
            yield Chunk("text", tuple(sources), tuple(contents), consumed)
            sources, contents, consumed, size = [], [], 0, 0
    if sources:
        yield Chunk("text", tuple(sources), tuple(contents), consumed)


def _line_chunks(file: InputFile, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a file at the last line end of each block."""
    line, consumed, empty = 1, 0, True
    parts: list[bytes] = []
    for block, block_consumed in _read_blocks(file, chunk_bytes):
        consumed += block_consumed
        cut = block.rfind(b"\n") + 1
        if not cut:
            parts.append(block)
            continue
        data = b"".join([*parts, block[:cut]])
        yield Chunk("jsonl", (file.name,), (data,), consumed, line)
        line, consumed, parts, empty = line + data.count(b"\n"), 0, [block[cut:]], False
    if (data := b"".join(parts)) or empty:
        yield Chunk("jsonl", (file.name,), (data,) if data else (), consumed, line)


def _row_chunks(file: InputFile, chunk_bytes: int, text_key: str) -> Iterator[Chunk]:
    texts: list[bytes | None] = []
    first, size = 0, 0
    rows, batches = parquet_texts(file.path, text_key)

    def chunk() -> Chunk:
        start, end = ((file.size or 0) * row // max(rows, 1) for row in (first, first + len(texts)))
        return Chunk("parquet", (file.name,), tuple(texts), end - start, first + 1)

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
        reason = error.strerror or error
        raise DataError(f"{file.name} cannot be read ({reason}): correct path or permissions") from error
    if file.size is not None and read != file.size:
        raise DataError(
            f"{file.name} had {file.size} bytes and {read} when it was read: wait until nobody writes to it"
        )


def chunk_documents(chunk: Chunk, rules: Rules, stats: CorpusStats) -> list[Document]:
    """Decode the texts of one chunk, counting into `stats`.

    Raises:
        DataError: with `rules.strict`, naming file and line of what cannot be decoded.
    """
    documents = []
    decode = _json_decoder(rules.text_key) if chunk.format == "jsonl" else _decode
    if not chunk.contents:
        stats.skip(chunk.sources[0], "empty", 0)
    for source, place, content in _entries(chunk):
        try:
            text = decode(content)
            size = len(text.encode())  # refuses the lone surrogates that JSON can hold
        except UNDECODABLE as error:
            kind, what = next((kind, what) for types, kind, what in REASONS if isinstance(error, types))
            if rules.strict:
                line = place or content.count(b"\n", 0, getattr(error, "start", 0)) + 1
                what = f"{source}:{line} {what.format(key=rules.text_key)}"
                raise DataError(f"{what}: repair it, or leave out --strict to skip it") from error
            stats.skip(source, kind, place)
            continue
        if text and not text.isspace():
            documents.append((text, size, source, place))
            stats.text_bytes += size
        else:
            stats.skip(source, "empty", place)
    stats.documents += len(documents)
    return documents


def _entries(chunk: Chunk) -> Iterator[tuple[str, int, Any]]:
    """File, place and bytes of each document of a chunk."""
    source = chunk.sources[0]
    if chunk.format == "text":
        for source, content in zip(chunk.sources, chunk.contents, strict=True):
            yield source, 0, (content or b"").removeprefix(BOM)
    elif chunk.format == "parquet":
        for row, content in enumerate(chunk.contents, start=chunk.first):
            yield source, row, content
    else:
        data = b"".join(filter(None, chunk.contents))
        marked = BOM in data
        for number, line in enumerate(data.split(b"\n"), start=chunk.first):
            if marked:
                line = line.removeprefix(BOM)  # concatenated files may have one anywhere
            if line and not line.isspace():
                yield source, number, line


def _decode(content: bytes | None) -> str:
    if content is None:
        raise KeyError
    return content.decode()


def _json_decoder(key: str) -> Callable[[bytes], str]:
    """Text under `key` in one line of JSON; see REASONS for what it raises."""
    parse = json.JSONDecoder(object_pairs_hook=partial(_refuse_duplicates, {key, *key.split(".")})).decode

    def decode(line: bytes) -> str:
        value = parse(line.decode())
        if not isinstance(value, dict):
            raise ValueError("not an object")
        for part in (key,) if key in value else key.split("."):
            if not isinstance(value, dict):
                raise KeyError(key)
            value = value[part]
        if not isinstance(value, str):
            raise TypeError(key)
        return value

    return decode


class _DuplicateKeyError(Exception):
    """The text key, or a part of it, occurs twice in an object, of which JSON readers silently take the last."""


def _refuse_duplicates(names: set[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs) and any([key for key, _ in pairs].count(name) > 1 for name in names):
        raise _DuplicateKeyError
    return found


UNDECODABLE = (_DuplicateKeyError, KeyError, TypeError, ValueError, RecursionError)
REASONS: tuple[tuple[tuple[type[Exception], ...], Kind, str], ...] = (
    ((UnicodeError,), "invalid_utf8", "is not valid UTF-8"),
    ((_DuplicateKeyError,), "two_texts", "has the key {key!r} twice"),
    ((KeyError,), "missing_text", "has no text under the key {key!r}"),
    ((TypeError,), "not_text", "has no string under the key {key!r}"),
    ((ValueError, RecursionError), "invalid_json", "is not a JSON object"),
)
"""Why a document cannot be decoded: exceptions, the most specific first, kind and message."""
