"""Writes weights that no run of this project has trained as a checkpoint of step 0, for any layout to continue."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_crnet.checkpoint.contents import bytes_of, saved_shapes
from megatron_crnet.checkpoint.directory import (
    PARTIAL,
    checkpoint_name,
    file_entries,
    name_latest,
    seal,
    unwritable,
)
from megatron_crnet.checkpoint.run_folder import GIB, RunFolders, states_in
from megatron_crnet.checkpoint.train_state import TrainingState
from megatron_crnet.checkpoint.weight_files import Shapes
from megatron_crnet.config.schema import Config
from megatron_crnet.data.fingerprint import TrainedOn
from megatron_crnet.engine.state_kinds import MASTER
from megatron_crnet.utils.errors import DataError, cannot_be_written
from megatron_crnet.utils.versions import library_versions


def write_starting_checkpoint(
    folder: Path, config: Config, trained_on: TrainedOn, origin: str, portions: Iterable[dict[str, Tensor]]
) -> Path:
    """Write FOLDER/step_00000000: the weights as fp32 masters, moments of zero. Returns it.

    Args:
        config: its model section is that of the weights.
        origin: where the weights are from, for state.json.
        portions: all canonical weights, some at a time; asked for the first after the folder was checked.

    Raises:
        DataError: FOLDER holds states of a run or cannot be written. Nothing is left behind.
        ConfigError: another process writes FOLDER.
    """
    target = folder / checkpoint_name(0)
    # a run with the checkpoint's own file continues from here
    config = replace(config, checkpoint=replace(config.checkpoint, dir=str(folder)))
    with RunFolders() as folders:
        folders.hold("the folder", folder)  # before anything is removed, which may be another writer's
        with _partial_checkpoint(target) as unfinished:
            if left := [name for name in states_in(folder) if name != unfinished.name]:
                raise DataError(
                    f"{folder} holds {left[0]}, and a run continues from the newest checkpoint: choose another folder"
                )
            shutil.rmtree(unfinished, ignore_errors=True)  # of a writer that was killed
            unfinished.mkdir()
            shapes = saved_shapes(config.model, config.optimizer)
            _check_space(folder, bytes_of(shapes))
            names = [_write_masters(unfinished, i, weights, shapes) for i, weights in enumerate(portions, start=1)]
            about, entries = _fresh_state(trained_on, origin), file_entries(unfinished, names)
            seal(unfinished, target, config, about, entries, layout=False)
            name_latest(target)
    return target


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file.

    Raises:
        DataError: it cannot be written.
    """
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # of a full disk, too
        raise DataError(cannot_be_written(file, error)) from error


@contextmanager
def _partial_checkpoint(target: Path) -> Iterator[Path]:
    unfinished = target.with_name(f"{PARTIAL}{target.name}")
    try:
        yield unfinished
    except OSError as error:
        raise DataError(str(unwritable(target.parent, error))) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DataError(
            f"{folder} has {free / GIB:,.2f} GiB free, but the checkpoint takes {size / GIB:,.2f} GiB: free some space "
            "or choose another folder"
        )


def _write_masters(folder: Path, number: int, weights: dict[str, Tensor], shapes: Shapes) -> str:
    """One file as a rank would write it that owns these weights whole. Returns its name.

    Args:
        shapes: of the whole checkpoint's tensors; those that are not in it, moments of frozen weights, are not written.
    """
    name = f"shard-{number:05d}-model-00001-of-00001.safetensors"
    tensors: dict[str, Tensor] = {}
    for entry, shape in shapes.items():
        kind, _, weight = entry.partition(".")
        if weight in weights:
            tensors[entry] = weights[weight] if kind == MASTER else torch.zeros(shape)
    save_tensors(tensors, folder / name)
    return name


def _fresh_state(trained_on: TrainedOn, origin: str) -> dict[str, Any]:
    """state.json before the first step. No rank's random state is in the files: the layout matches no run."""
    return {
        **asdict(TrainingState()),
        "adam_steps": 0,
        "layout": {"imported_from": origin},
        "trained_on": trained_on.values(),
        "versions": library_versions(),
    }
