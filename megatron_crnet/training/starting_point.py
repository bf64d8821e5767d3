"""`checkpoint.load`: another run's or an import's checkpoint, whose weights a new run starts from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_crnet.checkpoint.compatibility import check_resumable, saved_state
from megatron_crnet.checkpoint.directory import checkpoints_at
from megatron_crnet.checkpoint.manager import newest_complete
from megatron_crnet.config.schema import Config
from megatron_crnet.data.fingerprint import SHOWN, TrainedOn
from megatron_crnet.distributed.consensus import examine_together
from megatron_crnet.utils.errors import ConfigError, DataError


@dataclass(frozen=True)
class StartingPoint:
    """A whole checkpoint that fits the model.

    Attributes:
        state: its state.json.
        optimizer: whether its moments, and Adam's count of updates, are taken over with the weights.
        remarks: lines on what is not as it was.
    """

    checkpoint: Path
    state: dict[str, Any]
    optimizer: bool
    remarks: tuple[str, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """For run.json and state.json."""
        return {"checkpoint": str(self.checkpoint), "step": self.state["step"], "optimizer_state": self.optimizer}

    @property
    def line(self) -> str:
        """For the log."""
        what = "weights and optimizer state" if self.optimizer else "weights"
        return f"starting from the {what} of {self.checkpoint} (its step {self.state['step']}), at step 0"


def find_starting_point(config: Config, trained_on: TrainedOn) -> StartingPoint:
    """The checkpoint that `checkpoint.load` names, checked on all ranks; a collective call.

    Raises:
        ConfigError: there is no whole checkpoint, or it is of another model.
    """
    path = Path(config.checkpoint.load or "")
    found = examine_together(partial(_examine_path, path))
    checkpoint, damaged = newest_complete(found)
    if checkpoint is None:
        raise ConfigError(f"checkpoint.load {path} holds no whole checkpoint ({damaged[0]}): give another")
    state, remarks = examine_together(partial(_examine_state, config, checkpoint, trained_on))
    lines = (*(f"warning: {line}" for line in damaged), *remarks)
    return StartingPoint(checkpoint, state, config.checkpoint.load_optimizer, lines)


def _examine_path(path: Path) -> tuple[list[Path], dict[str, str]]:
    try:
        found = checkpoints_at(path)
    except DataError as error:
        raise ConfigError(f"checkpoint.load {error}") from error
    # not all names: its run may be writing more of them
    what = "a checkpoint" if found == [path] else f"checkpoints in {found[0].parent}"
    return found, {f"checkpoint.load {path}": what}


def _examine_state(
    config: Config, checkpoint: Path, trained_on: TrainedOn
) -> tuple[tuple[dict[str, Any], list[str]], dict[str, str]]:
    state = saved_state(checkpoint)
    at = None if config.training.eval_only else 0
    remedy = "use the saved values or another checkpoint.load"
    check_resumable(config, checkpoint, remedy, at, with_moments=config.checkpoint.load_optimizer)
    before, remarks = TrainedOn.from_state(state), []
    if before is not None and before.tokenizer and before.tokenizer != trained_on.tokenizer:
        remarks.append(
            f"warning: the weights of {checkpoint} were trained with the tokenizer {before.tokenizer[:SHOWN]}, not "
            f"with data.tokenizer_model, which is {trained_on.tokenizer[:SHOWN]}: their embeddings are those of other "
            "tokens"
        )
    return (state, remarks), {}
