"""The running Python's standard library as a corpus: real text that every machine has, in a fixed order."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_crnet.utils.errors import ConfigError, DataError
from megatron_crnet.utils.files import atomic_files, exists

ENOUGH_BYTES = 10_000_000
NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__"})
TESTS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True)
class SourceFile:
    """A file and its name within the corpus: the path from the library's root, with forward slashes."""

    name: str
    path: Path


def standard_library_files(root: Path | None = None, enough_bytes: int = ENOUGH_BYTES) -> list[SourceFile]:
    """The `.py` files of the standard library, sorted by name.

    Tests are left out, unless the library is below `enough_bytes` without them: distributions split
    Python into packages and some install only a part.

    Args:
        root: folder of the library; None asks the running Python.
        enough_bytes: what the files must come to.

    Raises:
        DataError: even with the tests there is less than `enough_bytes`.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    for excluded in (NOT_THE_LIBRARY | TESTS, NOT_THE_LIBRARY):
        files = _python_files(root, excluded)
        size = sum(file.path.stat().st_size for file in files)
        if size >= enough_bytes:
            return files
    raise DataError(
        f"the standard library in {root} has {size} bytes of .py files, but {enough_bytes} are needed: "
        "install Python's whole standard library (python3-full on Debian) or use another corpus"
    )


def split_files(files: Sequence[SourceFile], valid_fraction: float) -> tuple[list[SourceFile], list[SourceFile]]:
    """Split into training and validation files, each in the given order.

    A file's side depends on its name alone, so files that come or go move no other file.

    Raises:
        ConfigError: `valid_fraction` is not between 0 and 1.
        DataError: one side is empty.
    """
    if not 0 < valid_fraction < 1:
        raise ConfigError(f"valid_fraction is {valid_fraction}, but must lie between 0 and 1: use 0.05, say")
    train = [file for file in files if _position(file.name) >= valid_fraction]
    valid = [file for file in files if _position(file.name) < valid_fraction]
    if not train or not valid:
        raise DataError(
            f"valid_fraction {valid_fraction} splits {len(files)} files into {len(train)} for training and "
            f"{len(valid)} for validation, but each needs one: change the fraction or give more files"
        )
    return train, valid


def write_corpus(folder: Path, valid_fraction: float = 0.05, files: Sequence[SourceFile] | None = None) -> str:
    """Write FOLDER/train.jsonl and FOLDER/valid.jsonl, one document a file, and corpus.json, which describes them.

    Does nothing when corpus.json says that the folder holds this already; a corpus that it describes is
    replaced when the files have changed. Files that are not UTF-8 are left out, which the line says.

    Args:
        folder: made if need be.
        valid_fraction: share of the files for validation.
        files: what to write; None takes `standard_library_files()`.

    Returns:
        One line about what was done.

    Raises:
        DataError: the folder holds such files of another origin, or cannot be written; see also `split_files`.
    """
    parts = split_files(standard_library_files() if files is None else files, valid_fraction)
    left_out: list[str] = []
    names = ("train.jsonl", "valid.jsonl")
    outputs = {name: _json_lines(part, left_out) for name, part in zip(names, parts, strict=True)}
    description = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "documents": data.count(b"\n")}
        for name, data in outputs.items()
    }
    marker = folder / "corpus.json"
    summary = ", ".join(f"{folder / name}: {d['documents']} documents" for name, d in description.items())
    if left_out:
        summary += f"; left out {len(left_out)} that are not UTF-8: {', '.join(left_out)}"
    if _holds(folder, marker, description):
        return f"{summary} (already there)"
    targets = (*(folder / name for name in outputs), marker)
    foreign = [] if marker.exists() else [target for target in targets if exists(target)]
    if foreign:
        raise DataError(f"{foreign[0]} exists already and is not of this command: choose another folder")
    with atomic_files(*targets, overwrite=True) as temporaries:
        for temporary, data in zip(temporaries, outputs.values(), strict=False):
            temporary.write_bytes(data)
        temporaries[-1].write_text(json.dumps(description, indent=1) + "\n")
    return summary


def _json_lines(files: Sequence[SourceFile], left_out: list[str]) -> bytes:
    lines = []
    for file in files:
        try:
            text = file.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            left_out.append(file.name)
            continue
        lines.append(json.dumps({"name": file.name, "text": text}, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _holds(folder: Path, marker: Path, description: dict[str, Any]) -> bool:
    try:
        described = json.loads(marker.read_text()) == description
        return described and all((folder / name).stat().st_size == d["bytes"] for name, d in description.items())
    except (OSError, ValueError):
        return False


def _python_files(root: Path, excluded: Iterable[str]) -> list[SourceFile]:
    found = [SourceFile(path.relative_to(root).as_posix(), path) for path in root.rglob("*.py") if path.is_file()]
    kept = [file for file in found if not set(excluded).intersection(file.name.split("/")[:-1])]
    return sorted(kept, key=lambda file: file.name)


def _position(name: str) -> float:
    """A fixed number in [0, 1) for each name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
