"""Reads documents from files and folders, in two steps that different processes can take.

`read_chunks` opens and decompresses files in a fixed order and hands out chunks of raw bytes;
`chunk_documents` decodes one chunk. A `.json`, `.jsonl` or `.ndjson` file holds one JSON object a line
(C4's layout); any other file is one document. Both may end in `.gz` or `.zst`.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from megatron_crnet.errors import DataError

CHUNK_BYTES = 1 << 18
LINE_SUFFIXES = {".json", ".jsonl", ".ndjson"}
COMPRESSED_SUFFIXES = {".gz", ".zst"}


@dataclass
class CorpusStats:
    """What was read and what was skipped."""

    documents: int = 0
    """Documents handed out."""
    text_bytes: int = 0
    """Their UTF-8 size."""
    empty: int = 0
    """Documents without anything but white space."""
    invalid_utf8: int = 0
    """Lines or files that are not UTF-8, or whose JSON spells half a surrogate pair."""
    invalid_json: int = 0
    """Lines that are not a JSON object."""
    missing_text: int = 0
    """Objects without the key, or whose value is not a string."""

    @property
    def skipped(self) -> int:
        """All that was left out."""
        return self.empty + self.invalid_utf8 + self.invalid_json + self.missing_text

    def add(self, other: CorpusStats) -> None:
        """Add the counts of another part of the corpus."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


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


Chunk = LineChunk | FileChunk


@dataclass(frozen=True)
class Rules:
    """How chunks become documents."""

    text_key: str = "text"
    """Key of the text in a JSON object."""
    strict: bool = False
    """Refuse the first unreadable line or file instead of counting it."""


def iter_documents(
    paths: Iterable[str | Path],
    text_key: str = "text",
    strict: bool = False,
    stats: CorpusStats | None = None,
) -> Iterator[str]:
    """Yield the text of every document of `paths` in a fixed order, counting into `stats`.

    Raises:
        DataError: a path is missing or damaged; with `strict`, a line or file that cannot be decoded.
    """
    stats = CorpusStats() if stats is None else stats
    for chunk in read_chunks(list_files(paths)):
        yield from chunk_documents(chunk, Rules(text_key, strict), stats)


def list_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files of `paths` in order; a folder stands for its files, sorted by their path within it.

    Hidden files and folders inside a folder are passed over.

    Raises:
        DataError: a path is neither a file nor a folder.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
            visible = [name for name in inside if not any(part.startswith(".") for part in name.parts)]
            files += [inside[name] for name in sorted(visible, key=lambda name: name.as_posix())]
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path} is neither a file nor a folder: correct the path")
    return files


def read_chunks(files: Iterable[Path], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Read and decompress `files` into chunks of about `chunk_bytes`, in order.

    Raises:
        DataError: a file cannot be read, or its compression is damaged.
    """
    for lines, group in itertools.groupby(files, key=_is_lines):
        if lines:
            for file in group:
                yield from _line_chunks(file, chunk_bytes)
        else:
            yield from _file_chunks(group, chunk_bytes)


def chunk_documents(chunk: Chunk, rules: Rules, stats: CorpusStats) -> list[str]:
    """Decode the documents of one chunk, counting into `stats`.

    Raises:
        DataError: with `rules.strict`, naming file and line of what cannot be decoded.
    """
    decoded = _decode_lines(chunk, rules, stats) if isinstance(chunk, LineChunk) else _decode_files(chunk, rules, stats)
    documents = []
    for text, size in decoded:
        if text and not text.isspace():
            documents.append(text)
            stats.text_bytes += size
        else:
            stats.empty += 1
    stats.documents += len(documents)
    return documents


def _decode_lines(chunk: LineChunk, rules: Rules, stats: CorpusStats) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(chunk.data.split(b"\n"), start=chunk.first_line):
        if not line or line.isspace():
            continue
        try:
            text = _text_of(json.loads(line.decode()), rules.text_key)
            yield text, len(text.encode())
        except UnicodeError as error:
            stats.invalid_utf8 += 1
            _refuse_if(rules.strict, f"{chunk.source}:{number}", "is not valid UTF-8", error)
        except KeyError as error:
            stats.missing_text += 1
            _refuse_if(rules.strict, f"{chunk.source}:{number}", f"has no text under the key {rules.text_key!r}", error)
        except (ValueError, RecursionError) as error:
            stats.invalid_json += 1
            _refuse_if(rules.strict, f"{chunk.source}:{number}", "is not a JSON object", error)


def _decode_files(chunk: FileChunk, rules: Rules, stats: CorpusStats) -> Iterator[tuple[str, int]]:
    for source, content in zip(chunk.sources, chunk.contents, strict=True):
        try:
            yield content.decode(), len(content)
        except UnicodeDecodeError as error:
            stats.invalid_utf8 += 1
            line = content.count(b"\n", 0, error.start) + 1
            _refuse_if(rules.strict, f"{source}:{line}", "is not valid UTF-8", error)


def _text_of(value: Any, key: str) -> str:
    if not isinstance(value, dict):
        raise ValueError("not an object")
    text = value[key]
    if not isinstance(text, str):
        raise KeyError(key)
    return text


def _refuse_if(strict: bool, where: str, what: str, error: Exception) -> None:
    if strict:
        raise DataError(f"{where} {what}: repair it, or leave out --strict to skip it") from error


def _is_lines(file: Path) -> bool:
    suffixes = file.suffixes[:-1] if file.suffix in COMPRESSED_SUFFIXES else file.suffixes
    return bool(suffixes) and suffixes[-1] in LINE_SUFFIXES


def _file_chunks(files: Iterable[Path], chunk_bytes: int) -> Iterator[FileChunk]:
    """Gather small files until they are worth a chunk."""
    sources: list[str] = []
    contents: list[bytes] = []
    consumed = size = 0
    for file in files:
        blocks = list(_read_blocks(file, 1 << 20))
        sources.append(str(file))
        contents.append(b"".join(block for block, _ in blocks))
        consumed += sum(block_consumed for _, block_consumed in blocks)
        size += len(contents[-1])
        if size >= chunk_bytes:
            yield FileChunk(tuple(sources), tuple(contents), consumed)
            sources, contents, consumed, size = [], [], 0, 0
    if sources:
        yield FileChunk(tuple(sources), tuple(contents), consumed)


def _line_chunks(file: Path, chunk_bytes: int) -> Iterator[LineChunk]:
    """Cut a file at the last line end of each block."""
    line, consumed = 1, 0
    parts: list[bytes] = []
    for block, block_consumed in _read_blocks(file, chunk_bytes):
        consumed += block_consumed
        cut = block.rfind(b"\n") + 1
        if not cut:
            parts.append(block)
            continue
        data = b"".join([*parts, block[:cut]])
        yield LineChunk(str(file), line, data, consumed)
        line, consumed, parts = line + data.count(b"\n"), 0, [block[cut:]]
    if data := b"".join(parts):
        yield LineChunk(str(file), line, data, consumed)


def _read_blocks(file: Path, size: int) -> Iterator[tuple[bytes, int]]:
    """Decompressed blocks of a file, each with the number of bytes read from disk for it."""
    try:
        with file.open("rb") as raw:
            before = 0
            for block in _decompressed(file, raw, size):
                yield block, raw.tell() - before
                before = raw.tell()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file} is truncated or damaged ({error}): fetch it again") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error}): correct path or permissions") from error


def _decompressed(file: Path, raw: BinaryIO, size: int) -> Iterator[bytes]:
    if file.suffix == ".zst":
        yield from _unzstd(raw, size)
        return
    stream: Any = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
    while block := stream.read(size):
        yield block


def _unzstd(raw: BinaryIO, size: int) -> Iterator[bytes]:
    """Frames one after the other. The library's own stream reader takes a truncated frame for a whole one."""
    import zstandard

    decompressor, finished = zstandard.ZstdDecompressor(), True
    while data := raw.read(size):
        while data:
            if finished:
                frame = decompressor.decompressobj()
            try:
                block = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            finished, data = frame.eof, frame.unused_data if frame.eof else b""
            if block:
                yield block
    if not finished:
        raise EOFError("the last frame is cut")
