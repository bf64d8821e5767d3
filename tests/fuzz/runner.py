"""Runs one of this project's programs on one odd input, in a forked process."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.forked import Program

CANARY = "canary"
"""A file that code from an input would make in the case's folder, if it was run."""
LIMIT_S = 120.0
"""What takes a second on an idle machine, and more on a busy one, has hung after this."""
MOST_LINES = 40
"""Of usage, or of what was passed over, before the line on what is wrong."""
BEFORE = "import resource; resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, 24 * 2**30))"
"""Limits the address space: what asks for more must have been refused by arithmetic."""


@dataclass(frozen=True)
class Case:
    """One odd input.

    Attributes:
        name: what is odd.
        program: path from the repository's root.
        argv: its command line.
        prepare: changes the files of a fresh folder, which is the working folder.
        statuses: the exit statuses that are right.
        environment: variables beside the process's own.
    """

    name: str
    program: str
    argv: tuple[str, ...]
    prepare: Callable[[Path], None] = lambda folder: None
    statuses: tuple[int, ...] = (0, 2)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a case did."""

    status: int | None
    output: str
    errors: str
    left: tuple[str, ...]
    """Files that are new, changed or gone."""
    ran_code: bool
    seconds: float


def run_case(case: Case, folder: Path) -> Outcome:
    """Run the case in `folder`, whose files it may change."""
    case.prepare(folder)
    before, started = _files(folder), time.monotonic()
    process = Program(case.program, case.argv, folder, {"PYTHONDONTWRITEBYTECODE": "1", **case.environment}, BEFORE)
    status: int | None = None
    try:
        status = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        _kill(process.pid)
    texts = process.communicate()
    changed = {path for path, _ in before.items() ^ _files(folder).items()}
    ran_code = (folder / CANARY).exists()
    return Outcome(status, texts[0], texts[1], tuple(sorted(changed)), ran_code, time.monotonic() - started)


def fault(case: Case, found: Outcome) -> str | None:
    """What is wrong with an outcome, in words, or None.

    Wanted: no code of an input is run, an end in time with a status that the documentation names, no traceback; and
    what is refused is refused in one line, after usage or notes on what was passed over, and leaves nothing.
    """
    if found.ran_code:
        return "code from the input was run"
    if found.status is None:
        return f"no end after {LIMIT_S:.0f} s"
    if "Traceback (most recent call last)" in found.errors + found.output:
        return "a traceback"
    if found.status not in case.statuses:
        return f"status {found.status} instead of {' or '.join(map(str, case.statuses))}"
    if found.status == 0:
        return None
    *before, last = found.errors.splitlines() or [""]
    if "error" not in last or any("error" in line for line in before) or len(before) > MOST_LINES:
        return f"not one line on what is wrong: {found.errors[:300]!r}"
    if len(last) > 1000:
        return f"a line of {len(last)} characters"
    if found.status == 2 and found.left:
        return f"left or changed: {', '.join(found.left[:5])}"
    return None


def _files(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return {str(path.relative_to(folder)): _digest(path) for path in paths}


def _digest(path: Path) -> str:
    with contextlib.suppress(OSError):
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
    return "no file"


def _kill(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
