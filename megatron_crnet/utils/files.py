"""Files that exist whole or not at all, even if the process that writes them is stopped."""

from __future__ import annotations

import errno
import itertools
import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_crnet.utils.errors import DataError, cannot_be_written
from megatron_crnet.utils.folder_lock import holding

UNWRITABLE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EEXIST", "EISDIR")
}
"""Errors of a full or forbidden folder; any other OSError is not about the output."""


@contextmanager
def atomic_files(*targets: Path, overwrite: bool) -> Iterator[tuple[Path, ...]]:
    """Give temporary names beside `targets`; rename them in order if the block succeeds, else remove them.

    The last target marks the set as complete: an old one goes before any other file is replaced, so a stop between two
    renames never leaves it beside files that it does not belong to. A second process that writes the same set is
    refused.

    Raises:
        ConfigError: another process writes them.
        DataError: a target exists and `overwrite` is false, or its folder cannot be written.
    """
    if not overwrite:
        refuse_existing(*targets)
    temporaries = tuple(temporary_name(target, hidden=False) for target in targets)
    with ExitStack() as stack:
        stack.enter_context(_refuse_unwritable(targets[0]))
        for target in targets:
            _make_folder(target.parent)
        if len(targets) > 1:
            stack.enter_context(holding(targets[-1].with_name(f"{targets[-1].name}.lock"), str(targets[-1])))
        for temporary in temporaries:
            stack.callback(_try, temporary.unlink)
        temporaries[0].touch()  # before hours of work: a place that cannot be written is known now
        yield temporaries
        if len(targets) > 1:
            targets[-1].unlink(missing_ok=True)
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)


@contextmanager
def atomic_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give a new folder beside `target`; rename it if the block succeeds, else remove it.

    Raises:
        ConfigError: another process writes it.
        DataError: `target` exists and `overwrite` is false, or it cannot be written.
    """
    try:
        target = target.resolve()  # a link stays one, to the new folder
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a byte 0
        raise DataError(f"cannot write {str(target)!r}: {error}: choose another folder") from error
    if not overwrite:
        refuse_existing(target)
    temporary, old = temporary_name(target), temporary_name(target)
    with ExitStack() as stack:
        for folder in reversed([folder for folder in target.parents if not folder.exists()]):
            stack.callback(_try, folder.rmdir)  # fails where it is no longer empty
        stack.enter_context(_refuse_unwritable(target))
        _make_folder(target.parent)
        stack.enter_context(holding(target.with_name(f"{target.name}.lock"), str(target)))
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        stack.callback(_restore, old, target)
        temporary.mkdir()
        yield temporary
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _restore(old: Path, target: Path) -> None:
    if old.exists() and not target.exists():
        old.rename(target)


def _try(action: Callable[[], object]) -> None:
    with suppress(OSError):
        action()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # of any number: in /proc it is as if a folder were missing
        raise DataError(cannot_be_written(error.filename or folder, error)) from error


@contextmanager
def _refuse_unwritable(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise DataError(cannot_be_written(error.filename or target, error)) from error


def temporary_name(path: Path, hidden: bool = True) -> Path:
    """A name beside `path` that no process of any host has: in containers many have the same number."""
    return path.with_name(f"{'.' if hidden else ''}{path.name}.tmp-{secrets.token_hex(8)}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it if the block succeeds, else remove it. Keeps an OSError."""
    temporary = temporary_name(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        _try(temporary.unlink)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole: it holds the old text or the new one at any moment; raises OSError if it cannot."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; lines that are cut short or not an object are left out."""
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict):
                lines.append(found)
    return lines


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if it cannot be read or is something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def unused_name(path: Path) -> Path:
    """`path`, or with a number appended where that exists."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


def output_files(prefix: str | Path, *suffixes: str) -> tuple[Path, ...]:
    """The files PREFIX + suffix.

    Raises:
        DataError: the prefix is empty, ends in a folder's "/", holds a NUL or is too long.
    """
    text = os.fspath(prefix)
    if os.path.basename(text) in ("", ".", "..") or "\0" in text:
        raise DataError(
            f"the output prefix is {text!r}, but must end in the name of the files: give data/train, say, for "
            f"data/train{suffixes[0]}"
        )
    targets = tuple(Path(text + suffix) for suffix in suffixes)
    for target in targets:
        exists(target)
    return targets


def exists(target: Path) -> bool:
    """Whether there is something of that name.

    Raises:
        DataError: there cannot be: a name of 300 characters, a NUL, a folder that cannot be searched.
    """
    try:
        os.stat(target)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the output {str(target)[:80]!r} cannot be used ({reason}): choose another name") from error
    return True


def refuse_existing(*targets: Path) -> None:
    """Raise DataError if one of `targets` exists."""
    for target in targets:
        if exists(target):
            remedy = "remove it, choose another name, or add --overwrite (overwrite=True in Python)"
            raise DataError(f"{target} exists already: {remedy}")


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM raise SystemExit(143) in the block, which is then cleaned up; no effect outside the main thread."""
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
