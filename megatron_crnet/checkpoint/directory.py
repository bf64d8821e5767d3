"""Checkpoint directories: which exist, which are complete, which are pruned. No tensors in here.

DIR/step_00000100/   safetensors of every rank, state.json, config.yaml and, last, manifest.json
DIR/latest           name of the newest one, for people and scripts
DIR/.partial_*       one that is being written
DIR/rejected_*       state before a bad step: kept for inspection, never resumed from
DIR/damaged_*        one that a start has found damaged

Nothing here removes or replaces a quarantined state, and the only state is never quarantined.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_crnet.config.loading import save_resolved
from megatron_crnet.config.schema import Config
from megatron_crnet.utils.environment import read_run_file
from megatron_crnet.utils.errors import CheckpointError, DataError, describe
from megatron_crnet.utils.files import replace_text, unused_name

PREFIX = "step_"
FINAL = re.compile(rf"{PREFIX}[0-9]{{1,18}}")
PARTIAL = ".partial_"
REPLACED = ".replaced_"
REJECTED = "rejected_"
DAMAGED = "damaged_"
MANIFEST = "manifest.json"
FORMAT = 1
DAMAGES = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP}
"""Errors that a damaged checkpoint gives; any other OSError is of the file system, and may be gone the next time."""


def checkpoint_dir(config: Config) -> Path:
    """Folder of a run's checkpoints."""
    return Path(config.checkpoint.dir or Path(config.logging.output_dir) / "checkpoints")


def checkpoint_name(step: int) -> str:
    """Name of the folder of the state after `step` steps."""
    return f"{PREFIX}{step:08d}"


def saved_step(checkpoint: Path) -> int:
    """Steps done when the checkpoint was written, from its name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that carry a final name, the oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if FINAL.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=saved_step)


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoint at `path`, else those in this folder of checkpoints, or of this run, the oldest first.

    Raises:
        DataError: there is none.
    """
    if (path / MANIFEST).is_file() or (path / "state.json").is_file():
        return [path]
    noted = read_run_file(path).get("checkpoints")  # of a run with checkpoint.dir
    elsewhere = noted.get("dir") if isinstance(noted, dict) else None
    folders = [path, path / "checkpoints", *([Path(elsewhere)] if isinstance(elsewhere, str) else [])]
    if found := next(filter(None, map(checkpoints, folders)), None):
        return found
    raise DataError(
        f"{path} holds no checkpoint: give a step_ folder, a folder of them or the folder of a run; crnet convert "
        "from-hf makes one of an export"
    )


def newest_without(problem_of: Callable[[Path], str | None], found: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """The newest usable checkpoint, and a line on each newer one.

    Args:
        problem_of: why a checkpoint is unusable, None if it is not.
        found: checkpoints, the oldest first.
    """
    skipped: list[str] = []
    for checkpoint in reversed(found):
        if (problem := problem_of(checkpoint)) is None:
            return checkpoint, skipped
        skipped.append(f"checkpoint {checkpoint} {problem}: skipped")
    return None, skipped


def damage(checkpoint: Path, share: int = 0, shares: int = 1) -> str | None:
    """Why a checkpoint is not intact, None if it is.

    Args:
        share, shares: compare checksums of only this part of the files; sizes of all are compared.

    Raises:
        CheckpointError: its file system does not give its files, which may be intact.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"has format {manifest['format']}, this version reads {FORMAT}"
        files = _listed(manifest)
        unlisted = sorted({path.name for path in checkpoint.glob("*.safetensors")} - files.keys())
        if unlisted:
            return f"holds {unlisted[0]}, of which {MANIFEST} knows nothing"
        for name, entry in sorted(files.items()):
            path = checkpoint / name
            if not path.is_file():
                return f"lacks {name}"
            if path.stat().st_size != entry["bytes"]:
                return f"has {path.stat().st_size} bytes in {name} instead of {entry['bytes']}"
        for index, (name, entry) in enumerate(sorted(files.items())):
            if index % shares == share and checksum(checkpoint / name) != entry["sha256"]:
                return f"has another checksum in {name} than in {MANIFEST}"
    except FileNotFoundError:
        return f"has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return unreadable(checkpoint, error)
    return None


def unreadable(checkpoint: Path, error: Exception) -> str:
    """What is wrong with a checkpoint that an error shows to be damaged.

    Raises:
        CheckpointError: the error shows nothing of the kind.
    """
    if not isinstance(error, OSError) or error.errno in {None, *DAMAGES}:
        return f"cannot be read ({describe(error)})"
    raise CheckpointError(
        f"checkpoint {checkpoint} cannot be read now ({describe(error)}): start again when its file system answers, "
        "or move the checkpoint away to go on from an earlier one"
    ) from error


def _listed(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of a manifest, by file name.

    Raises:
        ValueError: it is not what `complete` writes.
    """
    files = manifest["files"]
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{MANIFEST} lists no files")
    for name, entry in files.items():
        if name != Path(name).name:
            raise ValueError(f"{MANIFEST} lists {name!r}, which leads out of the checkpoint")
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise ValueError(f"{MANIFEST} lists {name} without its size and checksum")
    return files


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entries(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The manifest entries of files, which are flushed to disk when this returns."""
    entries = {}
    for name in names:
        _to_disk(folder / name)
        entries[name] = {"bytes": (folder / name).stat().st_size, "sha256": checksum(folder / name)}
    return entries


def seal(
    partial: Path,
    target: Path,
    config: Config,
    about: Mapping[str, Any],
    entries: dict[str, Any],
    *,
    layout: bool = True,
) -> None:
    """Write everything but the tensors of a checkpoint, and give it its final name.

    Args:
        about: contents of state.json.
        entries: manifest entries of the tensor files.
        layout: whether ranks in the configuration's layout have written it.
    """
    (partial / "state.json").write_text(json.dumps(about, indent=1))
    save_resolved(config, partial / "config.yaml", layout)
    complete(partial, target, {**entries, **file_entries(partial, ["state.json", "config.yaml"])})


def complete(partial: Path, target: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest and give a partial checkpoint its final name; a `step_` folder of that name is replaced.

    Raises:
        FileExistsError: `target` exists and was set aside, which is never replaced.
    """
    if target.exists() and not FINAL.fullmatch(target.name):
        raise FileExistsError(errno.EEXIST, "exists already", str(target))
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True))
    for name in files:
        shutil.copymode(manifest, partial / name)  # safetensors lets only the owner read
    _to_disk(manifest)
    _to_disk(partial)
    replaced = target.with_name(f"{REPLACED}{target.name}")
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    _to_disk(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Finish the rename of a process that was killed inside `complete`."""
    for replaced in folder.glob(f"{REPLACED}*"):
        target = folder / replaced.name.removeprefix(REPLACED)
        if target.exists():
            _remove(replaced)
        else:
            replaced.rename(target)


def remove_partial(folder: Path) -> None:
    """Remove partial checkpoints of processes that were killed while saving; what cannot be removed stays."""
    for partial in folder.glob(f"{PARTIAL}*"):
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def name_latest(checkpoint: Path) -> bool:
    """Name the newest checkpoint in DIR/latest. Returns whether that was possible; else none is named.

    Nothing here reads that file, and a whole checkpoint is none the worse without it.
    """
    latest = checkpoint.parent / "latest"
    try:
        replace_text(latest, f"{checkpoint.name}\n")
    except OSError:
        _remove(latest)
        return False
    return True


def quarantine(folder: Path, step: int, prefix: str = REJECTED) -> Path | None:
    """Rename checkpoints of `step` and later, so that none is resumed from. Returns the newest that is left."""
    _remove(folder / "latest")  # on a full disk it may not be written again, and must not name a renamed folder
    for path in checkpoints(folder):
        if saved_step(path) >= step:
            path.rename(unused_name(folder / f"{prefix}{path.name}"))
    left = checkpoints(folder)
    if left:
        name_latest(left[-1])
    return left[-1] if left else None


def steps_to_prune(steps: Sequence[int], keep_last: int | None, keep_every: int | None, good: int) -> list[int]:
    """Steps whose checkpoints the retention policy drops: neither among the last nor a multiple of `keep_every`.

    The last one before step `good` is kept as well: a run that stops at a bad step goes back to it.
    """
    if keep_last is None:
        return []
    before = [step for step in steps if step < good]
    old = set(sorted(steps)[:-keep_last]) - {max(before, default=-1)}
    return sorted(step for step in old if not keep_every or step % keep_every)


def prune(folder: Path, keep_last: int | None, keep_every: int | None, good: int) -> None:
    """Remove what the retention policy drops, oldest first; a folder that cannot be removed stays."""
    for step in steps_to_prune([saved_step(path) for path in checkpoints(folder)], keep_last, keep_every, good):
        shutil.rmtree(folder / checkpoint_name(step), ignore_errors=True)


def unwritable(folder: Path, error: BaseException) -> CheckpointError:
    """The error for a folder that no checkpoint can be written into."""
    reason = (error.strerror if isinstance(error, OSError) else None) or describe(error)
    return CheckpointError(
        f"cannot write a checkpoint into {folder}: {reason}: free some space, correct the permissions or set "
        "checkpoint.dir; earlier checkpoints are untouched"
    )


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Turn any other exception than a CheckpointError into `unwritable`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise unwritable(folder, error) from error


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
