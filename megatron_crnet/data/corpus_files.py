"""Which files are a corpus, and how each is read. What cannot be read is refused by name before any work."""

from __future__ import annotations

import codecs
import errno
import itertools
import os
import re
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from megatron_crnet.data.corpus_stats import CorpusStats
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
class Rules:
    """How files become documents.

    Attributes:
        text_key: key of the text in a JSON object, or column of a Parquet file; `data.text` is the key text in the
            object data, unless there is a key that holds the dot.
        strict: refuse the first unreadable line or file, and broken links, instead of counting them.
        format: how every file is read; None goes by the suffix.
    """

    text_key: str = "text"
    strict: bool = False
    format: Format | None = None


@dataclass(frozen=True)
class InputFile:
    """A file and how it is read; `size` is its bytes on disk, None for standard input."""

    path: Path
    format: Format
    compression: Compression | None
    size: int | None

    @property
    def name(self) -> str:
        """Its name in messages."""
        return "standard input" if self.path == STANDARD_INPUT else str(self.path)

    def open(self) -> BinaryIO:
        """Its raw bytes."""
        return sys.stdin.buffer if self.path == STANDARD_INPUT else self.path.open("rb")


def total_bytes(files: Iterable[InputFile]) -> int | None:
    """Bytes of all files; None when standard input is among them."""
    sizes = [file.size for file in files]
    return None if None in sizes else sum(filter(None, sizes))


def list_files(
    paths: Iterable[str | Path], rules: Rules | None = None, stats: CorpusStats | None = None
) -> list[InputFile]:
    """The files of `paths` in order; a folder stands for its files, sorted by their path within it.

    In a folder, hidden files and folders are passed over, linked folders are followed, each once, and broken links
    are passed over; `stats` names them. "-" is standard input.

    Raises:
        DataError: a path is neither a file nor a folder, or a file cannot be read in the format that it has.
    """
    rules = rules or Rules()
    stats = CorpusStats() if stats is None else stats
    files: list[InputFile] = []
    refused: list[str] = []
    for path in map(Path, paths):
        for file in _files_within(path, rules.strict, stats) if os.path.isdir(path) else [path]:
            try:
                files.append(_input_file(file, rules))
            except DataError as error:
                refused.append(str(error))
    if refused:
        rest = len(refused) - NAMED_AT_ONCE
        raise DataError("; ".join(refused[:NAMED_AT_ONCE]) + (f"; and {rest} more files" if rest > 0 else ""))
    if [file.path for file in files].count(STANDARD_INPUT) > 1:
        raise DataError("standard input (-) is given twice, but can be read once: give it once")
    return files


def check_outside(targets: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Raise DataError if an output file is input, or would be the next time."""
    for path, target in itertools.product(map(Path, inputs), targets):
        if os.path.isdir(path) and target.resolve().is_relative_to(path.resolve()):
            raise DataError(
                f"the output {target} lies inside the input folder {path}, where it would be input the next time: "
                "choose another folder for it"
            )
        if target.resolve() == path.resolve():
            raise DataError(f"the output {target} is also the input: choose another name")


def _files_within(root: Path, strict: bool, stats: CorpusStats) -> list[Path]:
    """The files of a folder, sorted by their path within it; real folders are visited before linked ones."""
    found, kept = list[Path](), list[Path]()
    files, folders = dict[tuple[int, int], Path](), dict[tuple[int, int], Path]()
    pending = [root]
    while pending:
        for name, subfolders, names in os.walk(pending.pop(0), onerror=_refuse_folder):
            folder, real = Path(name), list[str]()
            first = folders.setdefault(_identity(folder), folder)
            if first != folder:
                stats.passed_over.append(f"{folder} (the same folder as {first})")
                names, subfolders[:] = [], []
            for path in (folder / entry for entry in sorted([*names, *subfolders])):
                if path.name.startswith("."):
                    stats.passed_over.append(f"{path} (hidden)")
                elif path.name in WITHOUT_ROWS:
                    stats.passed_over.append(f"{path} (holds no rows)")
                elif path.name not in subfolders:
                    found.append(path)
                elif path.is_symlink():
                    pending.append(path)
                else:
                    real.append(path.name)
            subfolders[:] = real
    for path in sorted(found, key=lambda path: path.relative_to(root).as_posix()):
        try:
            same = files.setdefault(_identity(path), path)
        except OSError as error:
            if strict or not path.is_symlink():
                raise DataError(f"{path} cannot be read ({error.strerror}): correct or remove it") from error
            stats.passed_over.append(f"{path} (a broken link to {os.readlink(path)})")
            continue
        kept.append(path)
        if same != path:
            stats.remarks.append(f"{path} is the same file as {same}; both were read")
    return kept


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read ({error.strerror}): correct its permissions") from error


def _input_file(path: Path, rules: Rules) -> InputFile:
    """Look at a file and its first bytes; raise DataError if it cannot be read."""
    by_suffix = rules.format is None
    size, head = (None, _peek_standard_input(rules)) if path == STANDARD_INPUT else _peek(path)
    file = InputFile(path, rules.format or _format(path, head), compression_of(head), size)
    if file.format == "parquet":
        check_parquet(path, rules.text_key)
        return file
    suffix = path.suffix.lower()
    try:
        if suffix in SUFFIXES and file.compression is None and head:
            raise DamagedError(f"not {SUFFIXES[suffix]}")
        text = beginning(head, file.compression)
    except DamagedError as error:
        raise DataError(f"{file.name} is truncated or damaged ({error}): fetch it again") from error
    _check_text(file, text, rules.text_key, by_suffix)
    return file


def _peek_standard_input(rules: Rules) -> bytes:
    if rules.format in (None, "parquet"):
        raise DataError("standard input (-) has no suffix that says what it holds: give --format jsonl or text")
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
    """The suffixes of a name in lower case, without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[:-1] if suffixes and suffixes[-1] in SUFFIXES else suffixes


def _format(path: Path, head: bytes) -> Format:
    """The format of a file by its first bytes and its suffix; raise DataError for what is not text."""
    suffix = (_suffixes(path) or [""])[-1]
    if head.startswith(b"MMIDIDX"):
        raise DataError(f"{path} is an index of tokens, not text: give the text that they were made of")
    for what, refused in REFUSED.items():
        if suffix in refused:
            raise DataError(f"{path} is {what}")
    return "parquet" if head.startswith(b"PAR1") else FORMATS.get(suffix, "text")


def _check_text(file: InputFile, text: bytes, text_key: str, by_suffix: bool) -> None:
    """Refuse a file that would be read as something that it is not."""
    if text.startswith(OTHER_BOMS):
        raise DataError(f"{file.name} is not UTF-8 but UTF-16 or UTF-32: convert it, with iconv -t UTF-8 say")
    line = text.removeprefix(BOM).lstrip().partition(b"\n")[0].strip()
    if file.format == "jsonl" and line.startswith(b"["):
        raise DataError(f"{file.name} holds a JSON array, not one object per line: convert it with jq -c '.[]'")
    if file.format == "jsonl" and line == b"{":
        raise DataError(f"{file.name} holds an object over several lines, not one per line: convert it with jq -c .")
    if file.format == "jsonl" or not by_suffix:
        return
    if FORMATS.keys() & _suffixes(file.path) and not _is_text(text):
        raise DataError(f"{file.name} is not text, and its last suffix says nothing: decompress or rename it")
    key = re.escape(text_key.rpartition(".")[2].encode())
    if re.match(rb'\{.*"' + key + rb'"\s*:', line):
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
