"""Training state on disk, in DeepSpeed's own format: written beside, renamed when whole.

DIR/step_00000100/   DeepSpeed's files of every rank
DIR/latest           name of the newest whole checkpoint
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from megatron_crnet.config import Config
from megatron_crnet.errors import CheckpointError
from megatron_crnet.settings import resolved

MODEL_SHAPE_SECTIONS = ("model", "parallel")


@dataclass(frozen=True)
class TrainingState:
    """What a run needs besides weights and moments to go on.

    Attributes:
        step: optimizer steps done.
        tokens: trained tokens so far.
    """

    step: int = 0
    tokens: int = 0


def checkpoint_dir(config: Config) -> Path:
    """Folder of a run's checkpoints."""
    return Path(config.checkpoint.dir or Path(config.logging.output_dir) / "checkpoints")


def save_checkpoint(engine: DeepSpeedEngine, config: Config, state: TrainingState) -> Path:
    """Write the state of all ranks; a collective call. `latest` moves only when everything is on disk."""
    folder = checkpoint_dir(config)
    name, partial = f"step_{state.step:08d}", f".partial_step_{state.step:08d}"
    client = {"step": state.step, "tokens": state.tokens, "config": resolved(config)}
    engine.save_checkpoint(str(folder), tag=partial, client_state=client, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        if not (folder / name).exists():
            (folder / partial).rename(folder / name)
        temporary = folder / f".latest.{os.getpid()}"
        temporary.write_text(name)
        temporary.replace(folder / "latest")
    dist.barrier()
    return folder / name


def newest_checkpoint(config: Config) -> Path | None:
    """The checkpoint that `latest` names; None for a run that has none."""
    latest = checkpoint_dir(config) / "latest"
    return checkpoint_dir(config) / latest.read_text().strip() if latest.exists() else None


def saved_step(checkpoint: Path) -> int:
    """Steps done when the checkpoint was written, from its name."""
    return int(checkpoint.name.removeprefix("step_"))


def load_checkpoint(engine: DeepSpeedEngine, config: Config, checkpoint: Path) -> TrainingState:
    """Fill engine and optimizer; a collective call.

    Raises:
        CheckpointError: files are missing, or the model or its layout differs from the saved one.
    """
    path, client = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False)
    if path is None or client is None:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: remove it, or name another checkpoint.dir")
    _check_same(client["config"], resolved(config), checkpoint)
    return TrainingState(client["step"], client["tokens"])


def _check_same(saved: dict[str, Any], wanted: dict[str, Any], checkpoint: Path) -> None:
    for section in MODEL_SHAPE_SECTIONS:
        for key, value in wanted[section].items():
            if saved[section].get(key) != value:
                raise CheckpointError(
                    f"checkpoint {checkpoint} was written with {section}.{key} {saved[section].get(key)}, but the "
                    f"configuration says {value}: use the saved value or another logging.output_dir"
                )
