"""Training state on disk, in DeepSpeed's own format: written beside, renamed when whole.

DIR/step_00000100/   DeepSpeed's files of every rank, and config.yaml
DIR/latest           name of the checkpoint that a run continues from
"""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.utils import ZeRORuntimeException

from megatron_crnet.config import Config
from megatron_crnet.deepspeed_rules import zero_stage
from megatron_crnet.errors import CheckpointError, ConfigError
from megatron_crnet.liveness import is_communication
from megatron_crnet.settings import resolved, save_config

PREFIX = "step_"
NOT_OF_THE_SHAPE = {"beta_init", "init_method_std", "hidden_dropout", "attention_dropout", "max_position_embeddings"}
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "sequence_parallel",  # decides which parameters share a flat buffer of DeepSpeed's
)
FLAT_BUFFER_KEYS = {"round_robin_gradients": (1, 2), "parameter_alignment": (1, 2), "sub_group_size": (3,)}
"""Keys of zero_optimization that order and cut the flat buffers which a checkpoint holds, and the stages that do so."""


@dataclass(frozen=True)
class TrainingState:
    """What a run needs besides weights and moments to go on.

    Attributes:
        step: optimizer steps done.
        tokens: trained tokens so far.
        samples: sequences drawn from the training data so far.
    """

    step: int = 0
    tokens: int = 0
    samples: int = 0


def checkpoint_dir(config: Config) -> Path:
    """Folder of a run's checkpoints."""
    return Path(config.checkpoint.dir or Path(config.logging.output_dir) / "checkpoints")


def save_checkpoint(engine: DeepSpeedEngine, config: Config, state: TrainingState, *, latest: bool = True) -> Path:
    """Write the state of all ranks; a collective call. A checkpoint of the same step is replaced.

    Args:
        latest: continue from it; `latest` moves only when everything is on disk.
    """
    folder = checkpoint_dir(config)
    partial, target = folder / f".partial_{PREFIX}{state.step:08d}", folder / f"{PREFIX}{state.step:08d}"
    is_main = dist.get_rank() == 0
    if is_main:
        for stale in folder.glob(".*_step_*"):
            shutil.rmtree(stale)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=partial.name, client_state=asdict(state), save_latest=False)
    dist.barrier()
    if is_main:
        save_config(config, partial / "config.yaml")
        if target.exists():
            target.rename(folder / f".replaced_{target.name}")
        partial.rename(target)
        if latest:
            _point_latest_at(target)
        shutil.rmtree(folder / f".replaced_{target.name}", ignore_errors=True)
    dist.barrier()
    return target


def _point_latest_at(checkpoint: Path) -> None:
    temporary = checkpoint.parent / f".latest.{os.getpid()}"
    temporary.write_text(checkpoint.name)
    temporary.replace(checkpoint.parent / "latest")


def newest_checkpoint(config: Config) -> Path | None:
    """The checkpoint that `latest` names, if it exists; None for a run that has none."""
    latest = checkpoint_dir(config) / "latest"
    named = checkpoint_dir(config) / latest.read_text().strip() if latest.is_file() else None
    return named if named and named.is_dir() and named.name.startswith(PREFIX) else None


def saved_step(checkpoint: Path) -> int:
    """Steps done when the checkpoint was written, from its name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def distrust_checkpoint(config: Config, step: int) -> Path | None:
    """Stop continuing from checkpoints of `step` and later; a collective call.

    Returns:
        The newest earlier one, which `latest` names now; None if there is none.
    """
    folder = checkpoint_dir(config)
    earlier = sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and saved_step(path) < step)
    dist.barrier()
    if dist.get_rank() == 0:
        if earlier:
            _point_latest_at(earlier[-1])
        else:
            (folder / "latest").unlink(missing_ok=True)
    dist.barrier()
    return earlier[-1] if earlier else None


def check_resumable(config: Config, checkpoint: Path) -> dict[str, Any]:
    """Refuse to continue a checkpoint of another model or layout. Returns its resolved configuration.

    Raises:
        ConfigError: a field that defines the weights or their distribution differs.
        CheckpointError: the checkpoint is not whole.
    """
    try:
        saved = yaml.safe_load((checkpoint / "config.yaml").read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} has no readable config.yaml: it is not whole, remove it"
        ) from error
    wanted = resolved(config)
    fields = [("model", name) for name in wanted["model"] if name not in NOT_OF_THE_SHAPE]
    fields += [("parallel", name) for name in LAYOUT] + [("training", "dtype")]
    for section, name in fields:
        _require_equal(checkpoint, f"{section}.{name}", saved[section].get(name), wanted[section][name])
    zero, own = (values["deepspeed"].get("zero_optimization", {}) for values in (saved, wanted))
    stage = zero_stage(config)
    _require_equal(checkpoint, "ZeRO stage", zero.get("stage", 0), stage)
    was, now = DeepSpeedZeroConfig(**zero), DeepSpeedZeroConfig(**own)
    for name, stages in FLAT_BUFFER_KEYS.items():
        if stage in stages:
            _require_equal(checkpoint, f"deepspeed.zero_optimization.{name}", getattr(was, name), getattr(now, name))
    return dict(saved)


def _require_equal(checkpoint: Path, name: str, saved: Any, wanted: Any) -> None:
    if saved != wanted:
        raise ConfigError(
            f"checkpoint {checkpoint} was written with {name} {saved}, but the configuration says {wanted}: "
            "use the saved value or another logging.output_dir"
        )


# what DeepSpeed and PyTorch stumble over in files that are missing, damaged, or of another number of ranks
LOAD_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    AssertionError,
    ValueError,
    pickle.UnpicklingError,
    ZeRORuntimeException,
)


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Path) -> TrainingState:
    """Fill engine and optimizer; a collective call.

    Raises:
        CheckpointError: files are missing or damaged, or were written by another number of ranks.
    """
    advice = "use the number of ranks that it was written with, or remove it to start again"
    try:
        path, client = engine.load_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False
        )
    except LOAD_ERRORS as error:
        if is_communication(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint {checkpoint} cannot be loaded ({reason}): {advice}") from error
    if path is None or client is None:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {advice}")
    return TrainingState(client["step"], client["tokens"], client["samples"])
