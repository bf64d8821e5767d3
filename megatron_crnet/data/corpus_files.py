"""Which files are a corpus, and how each is to be read. What cannot be read is refused by name before any work."""

from __future__ import annotations

import codecs
import errno
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from megatron_crnet.data.decompression import SUFFIXES, Compression, DamagedError, beginning, compression_of
from megatron_crnet.data.parquet import check_parquet
from megatron_crnet.utils.errors import DataError

Format = Literal["jsonl", "text", "parquet"]

STANDARD_INPUT = Path("-")
FORMATS: dict[str, Format] = {".json": "jsonl", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
"""By suffix, whatever its case; any other file is one document."""
REFUSED = {
    "an archive: unpack it": (".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar"),
    "compressed in a way that is not read: use gzip, zstd, bzip2 or xz": (".lz4", ".z", ".br", ".sz", ".lzo"),
    "a table: convert it to Parquet or JSON lines, or say --format text if it is one document": (
        *(".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".xls", ".xlsx"),
    ),
}
WITHOUT_ROWS = ("_SUCCESS", "_metadata", "_common_metadata")
"""What Spark and others write beside Parquet files."""
PEEK_BYTES = 1 << 16
BOM = b"\xef\xbb\xbf"
OTHER_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
NAMED_AT_ONCE = 5
"""Refused files that an error names; the others are counted."""


@dataclass(frozen=True)
class InputFile:
    """A file and how it is read."""

    path: Path
    format: Format
    compression: Compression | None
    size: int | None
    """Bytes on disk; None for standard input."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return "standard input" if self.path == STANDARD_INPUT else str(self.path)

    def open(self) -> BinaryIO:
        """Its raw bytes."""
        return sys.stdin.buffer if self.path == STANDARD_INPUT else self.path.open("rb")


@dataclass
class Listing:
    """The files of a corpus, in order, and the entries of folders that are none."""

    files: list[InputFile] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all files; None when standard input is among them."""
        sizes = [file.size for file in self.files if file.size is not None]
        return sum(sizes) if len(sizes) == len(self.files) else None


def list_files(
    paths: Iterable[str | Path], text_key: str = "text", file_format: Format | None = None, strict: bool = False
) -> Listing:
    """The files of `paths` in order; a folder stands for its files, sorted by their path within it.

    In a folder, hidden files and folders are passed over, linked folders are followed, each once, and broken links
    are named. "-" is standard input.

    Args:
        text_key: key of the text, which Parquet files must have as a column.
        file_format: how to read every file; None goes by the suffix.
        strict: refuse broken links.

    Raises:
        DataError: a path is neither a file nor a folder, or a file cannot be read in the format that it has.
    """
    listing = Listing()
    refused: list[str] = []
    for path in map(Path, paths):
        found = [path]
        if os.path.isdir(path):
            folder = _Folder(path, strict)
            found = folder.files()
            listing.passed_over += folder.passed_over
            listing.remarks += folder.remarks
        for file in found:
            try:
                listing.files.append(_input_file(file, text_key, file_format))
            except DataError as error:
                refused.append(str(error))
    if refused:
        rest = len(refused) - NAMED_AT_ONCE
        raise DataError("; ".join(refused[:NAMED_AT_ONCE]) + (f"; and {rest} more files" if rest > 0 else ""))
    if [file.path for file in listing.files].count(STANDARD_INPUT) > 1:
        raise DataError("standard input (-) is given twice, but can be read once: give it once")
    return listing


def check_outside(targets: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Raise DataError if a file that is written is input, or would be the next time."""
    for path in map(Path, inputs):
        for target in targets:
            resolved = target.resolve()
            if os.path.isdir(path) and resolved.is_relative_to(path.resolve()):
                raise DataError(
                    f"the output {target} lies inside the input folder {path}, where it would be input the next time: "
                    "choose another folder for it"
                )
            if resolved == path.resolve():
                raise DataError(f"the output {target} is also the input: choose another name")


class _Folder:
    """A walk through a folder, real folders before linked ones."""

    def __init__(self, root: Path, strict: bool) -> None:
        self.passed_over: list[str] = []
        self.remarks: list[str] = []
        self._root = root
        self._strict = strict
        self._folders: dict[tuple[int, int], Path] = {}
        self._files: dict[tuple[int, int], Path] = {}
        self._linked: list[Path] = []

    def files(self) -> list[Path]:
        """Its files, sorted by their path within it."""
        found = list(self._walk(self._root))
        while self._linked:
            found += self._walk(self._linked.pop(0))
        found.sort(key=lambda path: path.relative_to(self._root).as_posix())
        for path in found:
            identity = _identity(path.stat())
            if identity in self._files:
                self.remarks.append(f"{path} is the same file as {self._files[identity]}; both were read")
            self._files.setdefault(identity, path)
        return found

    def _walk(self, folder: Path) -> Iterator[Path]:
        identity = _identity(folder.stat())
        if identity in self._folders:
            self.passed_over.append(f"{folder} (the same folder as {self._folders[identity]})")
            return
        self._folders[identity] = folder
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder} cannot be read ({error.strerror}): correct its permissions") from error
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                self.passed_over.append(f"{path} (hidden)")
                continue
            if entry.name in WITHOUT_ROWS:
                self.passed_over.append(f"{path} (holds no rows)")
                continue
            try:
                mode = path.stat().st_mode
            except OSError as error:
                self._broken(path, error)
                continue
            if stat.S_ISDIR(mode) and entry.is_symlink():
                self._linked.append(path)
            elif stat.S_ISDIR(mode):
                yield from self._walk(path)
            else:
                yield path

    def _broken(self, path: Path, error: OSError) -> None:
        if not path.is_symlink() or self._strict:
            raise DataError(f"{path} cannot be read ({error.strerror}): correct or remove it") from error
        self.passed_over.append(f"{path} (a broken link to {os.readlink(path)})")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _input_file(path: Path, text_key: str, file_format: Format | None) -> InputFile:
    """Look at a file and its first bytes.

    Raises:
        DataError: it cannot be read.
    """
    if path == STANDARD_INPUT:
        if file_format is None or file_format == "parquet":
            raise DataError("standard input (-) has no suffix that says what it holds: give --format jsonl or text")
        head = _peek_standard_input()
        file = InputFile(path, file_format, compression_of(head), None)
    else:
        size, head = _peek(path)
        file = InputFile(path, file_format or _format(path, head), compression_of(head), size)
    if file_format is None:
        _refuse_other_kinds(path)
    if file.format == "parquet":
        check_parquet(path, text_key)
        return file
    suffix = path.suffix.lower()
    if suffix in SUFFIXES and file.compression is None and head:
        raise DataError(f"{path} is truncated or damaged (not {SUFFIXES[suffix]}): fetch it again")
    try:
        text = beginning(head, file.compression)
    except DamagedError as error:
        raise DataError(f"{file.name} is truncated or damaged ({error}): fetch it again") from error
    _refuse_other_text(file, text, text_key, by_suffix=file_format is None)
    return file


def _peek_standard_input() -> bytes:
    try:
        if not sys.stdin:  # it is None if it was closed when Python began
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return sys.stdin.buffer.peek(PEEK_BYTES) if hasattr(sys.stdin.buffer, "peek") else b""
    except OSError as error:
        raise DataError(
            f"standard input (-) cannot be read ({error.strerror or error}): give text by a pipe, or a file"
        ) from error


def _peek(path: Path) -> tuple[int, bytes]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(
                f"{path} is a pipe, socket or device, but neither a file nor a folder: give a file, or - and --format"
            )
        with path.open("rb") as raw:
            return status.st_size, raw.read(PEEK_BYTES)
    except (FileNotFoundError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"{path!s} is neither a file nor a folder: correct the path") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): correct path or permissions") from error


def _suffixes(path: Path) -> list[str]:
    """The suffixes of a name in lower case, without the one of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[:-1] if suffixes and suffixes[-1] in SUFFIXES else suffixes


def _format(path: Path, head: bytes) -> Format:
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"MMIDIDX"):
        raise DataError(f"{path} is an index of tokens, not text: give the text that they were made of")
    suffixes = _suffixes(path)
    return FORMATS.get(suffixes[-1], "text") if suffixes else "text"


def _refuse_other_kinds(path: Path) -> None:
    suffixes = _suffixes(path)
    for what, refused in REFUSED.items():
        if suffixes and suffixes[-1] in refused:
            raise DataError(f"{path} is {what}")


def _refuse_other_text(file: InputFile, text: bytes, text_key: str, by_suffix: bool) -> None:
    """Refuse what would be read as something that it is not."""
    if text.startswith(OTHER_BOMS):
        raise DataError(f"{file.name} is not UTF-8 but UTF-16 or UTF-32: convert it, with iconv -t UTF-8 say")
    line = text.removeprefix(BOM).lstrip().partition(b"\n")[0].strip()
    if file.format == "jsonl" and line.startswith(b"["):
        raise DataError(f"{file.name} holds a JSON array, not one object per line: convert it with jq -c '.[]'")
    if file.format == "jsonl" and line == b"{":
        raise DataError(f"{file.name} holds an object over several lines, not one per line: convert it with jq -c .")
    if by_suffix and file.format == "text" and FORMATS.keys() & _suffixes(file.path) and not _is_text(text):
        raise DataError(f"{file.name} is not text, and its last suffix says nothing: decompress or rename it")
    key = re.escape(text_key.rpartition(".")[2].encode())
    if by_suffix and file.format == "text" and re.match(rb'\{.*"' + key + rb'"\s*:', line):
        raise DataError(
            f"{file.name} seems to hold JSON lines, but its name does not end in .jsonl: say --format jsonl, or "
            "--format text if it is one document"
        )


def _is_text(text: bytes) -> bool:
    """Whether the beginning of a file can be UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text)
    except UnicodeDecodeError:
        return False
    return True
