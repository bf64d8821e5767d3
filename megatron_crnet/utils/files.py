"""Files that exist whole or not at all, also when the run that writes them is stopped."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_crnet.utils.errors import DataError
from megatron_crnet.utils.folder_lock import holding

UNWRITABLE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EEXIST", "EISDIR")
}
"""What a full or forbidden folder answers; any other OSError is not about the output."""


@contextmanager
def atomic_files(*targets: Path, overwrite: bool) -> Iterator[tuple[Path, ...]]:
    """Give temporary names beside `targets`; rename them in order if the block succeeds, else remove them.

    The last target marks the set as complete: an old one goes before any other file is replaced, so a
    stop between two renames never leaves it beside files that it does not belong to. Two processes that write the same
    set would mix it, so the second is refused.

    Raises:
        ConfigError: another process writes them.
        DataError: a target exists and `overwrite` is false, or its folder cannot be written.
    """
    if not overwrite:
        refuse_existing(*targets)
    temporaries = tuple(target.with_name(f"{target.name}.tmp-{os.getpid()}") for target in targets)
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(targets[-1]) if len(targets) > 1 else nullcontext(), _removed(temporaries):
            yield temporaries
            if len(targets) > 1:
                targets[-1].unlink(missing_ok=True)
            for temporary, target in zip(temporaries, targets, strict=True):
                os.replace(temporary, target)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise _unwritable(targets[0], error) from error


def _alone(target: Path) -> AbstractContextManager[None]:
    return holding(target.with_name(f"{target.name}.lock"), str(target))


@contextmanager
def _removed(temporaries: tuple[Path, ...]) -> Iterator[None]:
    try:
        yield
    finally:
        for temporary in temporaries:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def atomic_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give a new folder beside `target`; rename it if the block succeeds, else remove it.

    Raises:
        ConfigError: another process writes it.
        DataError: `target` exists and `overwrite` is false, or it cannot be written.
    """
    target = _resolved(target)  # a link stays one, to the new folder
    if not overwrite:
        refuse_existing(target)
    temporary, old = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        _make(target.parent)
        with _alone(target), _put_back(target, old, temporary):
            temporary.mkdir()
            yield temporary
            if target.exists():
                target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise _unwritable(target, error) from error
    finally:
        if not target.exists():
            _remove_empty(made)


@contextmanager
def _put_back(target: Path, old: Path, temporary: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Take away folders, the innermost first, that were made for something that did not come to be."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _resolved(target: Path) -> Path:
    try:
        return target.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a byte 0
        raise DataError(f"cannot write {str(target)!r}: {error}: choose another folder") from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # /proc answers as if the folder were missing
        raise _unwritable(folder, error) from error


def replace_text(path: Path, text: str) -> None:
    """Write a file whole: it holds the old text or the new one at any moment.

    Raises:
        OSError: it cannot be written; the old text is there, as after any other exception.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a line that is cut short, or is not an object, is left out."""
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict):
                lines.append(found)
    return lines


def unused_name(path: Path) -> Path:
    """`path`, or with a number behind it where something of that name exists."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


def _unwritable(target: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write {error.filename or target}: {error.strerror or error}: free some space, correct the "
        "permissions or choose another folder"
    )


def output_files(prefix: str | Path, *suffixes: str) -> tuple[Path, ...]:
    """The files that a prefix stands for.

    Raises:
        DataError: it is empty, ends in a folder's "/", holds a NUL or is too long.
    """
    text = os.fspath(prefix)
    if os.path.basename(text) in ("", ".", "..") or "\0" in text:
        raise DataError(
            f"the output prefix is {text!r}, but must end in the name of the files: give data/train, say, for "
            f"data/train{suffixes[0]}"
        )
    targets = tuple(Path(text + suffix) for suffix in suffixes)
    try:
        for target in targets:
            target.exists()
    except OSError as error:
        raise DataError(f"the output prefix {text} cannot be used ({error.strerror}): choose another") from error
    return targets


def exists(target: Path) -> bool:
    """Whether there is something of that name.

    Raises:
        DataError: there cannot be: a name of 300 characters, a byte 0, a folder that cannot be searched.
    """
    try:
        os.stat(target)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write {str(target)[:80]!r} ({error}): choose another name") from error
    return True


def refuse_existing(*targets: Path) -> None:
    """Raise DataError if one of `targets` exists."""
    for target in targets:
        if exists(target):
            remedy = "remove it, choose another name, or add --overwrite (overwrite=True in Python)"
            raise DataError(f"{target} exists already: {remedy}")


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM raise SystemExit(143) in the block, so that it is cleaned up like any other exception.

    Signals are the main thread's business: in another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _raise_system_exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _raise_system_exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
