"""The running Python's standard library as a corpus: real text that every machine has, in a fixed order."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_crnet.utils.errors import DataError, require
from megatron_crnet.utils.files import atomic_files, exists, read_json_object

ENOUGH_BYTES = 10_000_000
NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__"})
TESTS = frozenset({"test", "tests", "idle_test"})

SourceFiles = Mapping[str, Path]
"""Files by their names within the corpus: the path from the library's root, with forward slashes."""


def standard_library_files(root: Path | None = None, enough_bytes: int = ENOUGH_BYTES) -> SourceFiles:
    """The `.py` files of the standard library, sorted by name.

    Tests are left out, unless the library is below `enough_bytes` without them: distributions split
    Python into packages and some install only a part.

    Args:
        root: folder of the library; None asks the running Python.
        enough_bytes: required size of all files.

    Raises:
        DataError: even with the tests there is less than `enough_bytes`.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py") if path.is_file()}
    for excluded in (NOT_THE_LIBRARY | TESTS, NOT_THE_LIBRARY):
        files = {name: found[name] for name in sorted(found) if not excluded.intersection(name.split("/")[:-1])}
        size = sum(path.stat().st_size for path in files.values())
        if size >= enough_bytes:
            return files
    raise DataError(
        f"the standard library in {root} has {size} bytes of .py files, but {enough_bytes} are needed: "
        "install Python's whole standard library (python3-full on Debian) or use another corpus"
    )


def split_files(files: SourceFiles, valid_fraction: float) -> tuple[SourceFiles, SourceFiles]:
    """Split into training and validation files by a hash of each name, so other files do not matter.

    Raises:
        ConfigError: `valid_fraction` is not between 0 and 1.
        DataError: one side is empty.
    """
    require(0 < valid_fraction < 1, f"valid_fraction is {valid_fraction}, but must lie between 0 and 1: use 0.05, say")
    valid = {name: path for name, path in files.items() if _position(name) < valid_fraction}
    train = {name: path for name, path in files.items() if name not in valid}
    if not train or not valid:
        raise DataError(
            f"valid_fraction {valid_fraction} splits {len(files)} files into {len(train)} for training and "
            f"{len(valid)} for validation, but each needs one: change the fraction or give more files"
        )
    return train, valid


def _position(name: str) -> float:
    """A fixed number in [0, 1) for each name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def write_corpus(folder: Path, valid_fraction: float = 0.05, files: SourceFiles | None = None) -> str:
    """Write FOLDER/train.jsonl and FOLDER/valid.jsonl, one document per file, and corpus.json, which describes them.

    Does nothing if corpus.json describes this very corpus; another corpus that it describes is replaced. Files that are
    not UTF-8 are left out.

    Args:
        valid_fraction: share of the files for validation.
        files: what to write; None takes `standard_library_files()`.

    Returns:
        One line about what was done.

    Raises:
        DataError: the folder holds such files of another origin, or cannot be written; see also `split_files`.
    """
    parts = split_files(standard_library_files() if files is None else files, valid_fraction)
    left_out: list[str] = []
    outputs = [_json_lines(part, left_out) for part in parts]
    train, valid, marker = targets = [folder / name for name in ("train.jsonl", "valid.jsonl", "corpus.json")]
    description = {
        path.name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "documents": data.count(b"\n")}
        for path, data in zip((train, valid), outputs, strict=True)
    }
    summary = ", ".join(f"{folder / name}: {d['documents']} documents" for name, d in description.items())
    if left_out:
        summary += f"; left out {len(left_out)} that are not UTF-8: {', '.join(left_out)}"
    if _holds(marker, description):
        return f"{summary} (already there)"
    for target in [] if marker.exists() else targets:
        if exists(target):
            raise DataError(f"{target} exists already and is not of this command: choose another folder")
    with atomic_files(*targets, overwrite=True) as temporaries:
        for temporary, data in zip(temporaries, outputs, strict=False):
            temporary.write_bytes(data)
        temporaries[-1].write_text(json.dumps(description, indent=1) + "\n")
    return summary


def _json_lines(files: SourceFiles, left_out: list[str]) -> bytes:
    lines = []
    for name, path in files.items():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            left_out.append(name)
            continue
        lines.append(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _holds(marker: Path, description: dict[str, Any]) -> bool:
    files = [(marker.parent / name, about["bytes"]) for name, about in description.items()]
    return read_json_object(marker) == description and all(
        path.is_file() and path.stat().st_size == size for path, size in files
    )
