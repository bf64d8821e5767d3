"""Runs one of this project's programs on one odd input, in a process forked from one that has imported everything."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing as mp
import os
import resource
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parents[2]
CANARY = "canary"
"""A file that code from an input would make in the case's folder, if it was run."""
LIMIT_S = 120.0
"""What takes a second on an idle machine, and more on a busy one, has hung after this."""
MOST_LINES = 40
"""Of usage, or of what was passed over, before the line on what is wrong."""
MEMORY = 24 * 2**30
"""Bytes of address space: what asks for more must have been refused by arithmetic."""


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
    outputs = [folder.parent / f"{folder.name}.{name}" for name in ("out", "err")]
    process = _context().Process(target=_main, args=(case.program, case.argv, folder, outputs, case.environment))
    process.start()
    process.join(LIMIT_S)
    status = process.exitcode
    if status is None:
        _kill(process.pid)
        process.join()
    changed = {path for path, _ in before.items() ^ _files(folder).items()}
    ran_code = (folder / CANARY).exists()
    texts = [path.read_text(errors="replace") if path.exists() else "" for path in outputs]
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


def _kill(pid: int | None) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@cache
def _context() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.fuzz.preload"])
    return context


def _main(program: str, argv: tuple[str, ...], folder: Path, outputs: list[Path], environment: dict[str, str]) -> None:
    """The child: the program as `python program argv`, its output in files."""
    with _redirected(outputs):
        status = 1
        try:
            os.chdir(folder)
            os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", **environment)
            torch.set_num_threads(1)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            sys.argv = [str(ROOT / program), *argv]
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as error:
            # what Python itself does with it
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def _redirected(outputs: list[Path]) -> Iterator[None]:
    for number, path in enumerate(outputs, 1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    # the forkserver's own objects may be bound to other descriptors
    sys.stdout, sys.stderr = (open(n, "w", closefd=False, errors="backslashreplace") for n in (1, 2))  # noqa: SIM115
    yield
