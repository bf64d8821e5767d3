"""Locks and checks the two folders of a run, `logging.output_dir` and `checkpoint.dir`, before it writes anything.

They are locked against other writers, what could not be written at the end is refused at the start, and no run starts
from random weights where an earlier one has left state.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path

from megatron_crnet.checkpoint.contents import bytes_of, saved_shapes
from megatron_crnet.checkpoint.directory import (
    DAMAGED,
    MANIFEST,
    PARTIAL,
    PREFIX,
    REJECTED,
    REPLACED,
    checkpoint_dir,
    checkpoints,
)
from megatron_crnet.config.phases import planned_phases
from megatron_crnet.config.schema import Config
from megatron_crnet.distributed.consensus import run_on_all_ranks
from megatron_crnet.utils.environment import RUN_FILE, read_run_file
from megatron_crnet.utils.errors import ConfigError, cannot_be_written
from megatron_crnet.utils.files import read_json_lines
from megatron_crnet.utils.folder_lock import LOCK, FolderLock, take

GIB = 2**30
FOLDERS = ("tensorboard", "stacks")
WRITTEN = {
    "logging.output_dir": ("metrics.jsonl", "config.yaml", RUN_FILE, "loss.png", *FOLDERS),
    "checkpoint.dir": ("latest",),
}
"""Names that a run writes."""
STATE = ("*.safetensors", "state.json", MANIFEST, "*.pt", "step_*/manifest.json")
"""What a folder below checkpoint.dir holds when it is, or holds, the state of a run."""


class RunFolders(AbstractContextManager["RunFolders"]):
    """The locks on the folders of a run, until the end of a `with` block; empty on ranks other than 0."""

    def __init__(self) -> None:
        self._locks: list[FolderLock] = []
        self._made: list[Path] = []

    def hold(self, field: str, folder: Path) -> None:
        """Make a folder where it is missing, and lock it.

        Raises:
            ConfigError: it cannot be made or written, or another process holds it.
        """
        try:
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            self._made += missing
            lock = take(folder / LOCK, f"{field} {folder}")
        except (OSError, ValueError) as error:
            raise ConfigError(cannot_be_written(f"{field} {folder}", error)) from error
        if lock is not None:
            self._locks.append(lock)

    def check(self) -> None:
        """Raise FolderTakenError if another process holds one of them now."""
        for lock in self._locks:
            lock.check()

    @property
    def taken(self) -> bool:
        """Whether another process is known to hold one of them."""
        return any(lock.taken_by is not None for lock in self._locks)

    def close(self) -> None:
        """Release the locks and remove folders that were created and are empty."""
        for lock in self._locks:
            lock.release()
        for folder in sorted(self._made, key=lambda path: -len(path.parts)):
            with suppress(OSError):  # it is not empty
                folder.rmdir()

    def __exit__(self, *_: object) -> None:
        self.close()


def hold_run_folders(config: Config, is_main: bool) -> RunFolders:
    """Lock both folders for this run and check that everything can be written later; a collective call.

    Raises:
        ConfigError, DataError: another process holds one, or something in it is in the way.
    """
    return run_on_all_ranks(partial(_hold, config, is_main))


def _hold(config: Config, is_main: bool) -> RunFolders:
    folders = RunFolders()
    if is_main:
        places = {"logging.output_dir": Path(config.logging.output_dir), "checkpoint.dir": checkpoint_dir(config)}
        try:
            for field, folder in places.items():
                folders.hold(field, folder)
            for field, folder in places.items():
                _check_files(field, folder)
        except BaseException:
            folders.close()
            raise
    return folders


def _check_files(field: str, folder: Path) -> None:
    """Raise for anything in the place of a file or a folder that is written later."""
    for path in (folder / name for name in WRITTEN[field]):
        if path.exists() and path.is_dir() != (path.name in FOLDERS):
            found, wanted = ("folder", "file") if path.is_dir() else ("file", "folder")
            raise ConfigError(
                f"{field} {folder} holds a {found} {path.name}, where the run writes a {wanted} of that name: remove "
                "it, or choose another folder"
            )
        if path.exists() and not os.access(path, os.W_OK):
            raise ConfigError(cannot_be_written(f"{field} {path}", PermissionError("no permission to write")))


def check_remains(config: Config, damaged: Sequence[str]) -> None:
    """Refuse to start from random weights where an earlier run has left anything but a checkpoint to continue from.

    Args:
        damaged: a line on each damaged checkpoint.

    Raises:
        ConfigError: names what is there, and what to do with it.
    """
    output, folder = Path(config.logging.output_dir), checkpoint_dir(config)
    before = read_run_file(output).get("checkpoints")
    nothing_saved = isinstance(before, dict) and before.get("newest_step", 0) is None
    left = [name for name in states_in(folder) if not (nothing_saved and name.startswith(PARTIAL))]
    if left:
        named = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        raise ConfigError(
            f"checkpoint.dir {folder} holds {named}, but no whole {PREFIX} folder to continue from"
            f"{f' ({damaged[0]})' if damaged else ''}: rename a whole one to {PREFIX}N, where N is the step in its "
            "state.json, to continue from it, or move the folder away to start from random weights"
        )
    steps = _logged_steps(output / "metrics.jsonl")
    if steps and not nothing_saved:
        where = str(before.get("dir", folder)) if isinstance(before, dict) else str(folder)
        elsewhere = f" (those of that run are in {where})" if Path(where).resolve() != folder.resolve() else ""
        raise ConfigError(
            f"logging.output_dir {output} holds the metrics of {steps} steps, but checkpoint.dir {folder} no "
            f"checkpoint to continue from{elsewhere}: set checkpoint.dir to its checkpoints, or choose another "
            "logging.output_dir or move this one away to start from random weights"
        )


def states_in(folder: Path) -> list[str]:
    """Names of folders that are or hold states of a run, whatever they are called; `.` for the folder itself."""
    if not folder.is_dir():
        return []
    prefixes = (PREFIX, REJECTED, DAMAGED, PARTIAL, REPLACED)
    below = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [
        path.name
        for path in below
        if path.name.startswith(prefixes) or any(next(path.glob(pattern), None) for pattern in STATE)
    ]
    return ([folder.name] if any((folder / name).is_file() for name in ("state.json", MANIFEST)) else []) + found


def _logged_steps(metrics: Path) -> int:
    """The largest step of a metrics.jsonl, 0 where there is none."""
    steps = [0]
    with suppress(OSError):
        for line in read_json_lines(metrics):
            with suppress(ValueError, KeyError, TypeError, OverflowError):
                steps.append(int(line["step"]))
    return max(steps)


def checkpoint_bytes(config: Config, step: int) -> int:
    """Of the largest checkpoint that a run writes after `step` steps."""
    models = [phase.config.model for phase in planned_phases(config) if phase.stop > step] or [config.model]
    return max(bytes_of(saved_shapes(model, config.optimizer)) for model in models)


def check_space(config: Config, step: int) -> str | None:
    """Compare free space with what checkpoints take. Returns a warning where it is for some of them only.

    Args:
        step: steps done already.

    Raises:
        ConfigError: there is no room for one.
    """
    folder = checkpoint_dir(config)
    free, size = shutil.disk_usage(folder).free, checkpoint_bytes(config, step)
    one = f"one checkpoint of this run takes up to {size / GIB:,.2f} GiB"
    if free < size:
        raise ConfigError(
            f"checkpoint.dir {folder} has {free / GIB:,.2f} GiB free, but {one}: free some space or choose another "
            "folder"
        )
    section, steps = config.checkpoint, config.training.train_steps - step
    count = max(1, -(-steps // section.save_interval)) if section.save_interval else 1
    if section.keep_last is not None:  # one is written before an older one goes
        count = min(count, max(section.keep_last - len(checkpoints(folder)), 0) + 1)
    if free >= count * size:
        return None
    return (
        f"checkpoint.dir {folder} has {free / GIB:,.2f} GiB free, but {one}, and this run writes up to {count} more at "
        "a time: set checkpoint.keep_last, or free some space"
    )
