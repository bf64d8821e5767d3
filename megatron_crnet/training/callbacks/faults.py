"""The `faults` section: detects bad steps, skips them, or stops the run at a checkpoint before them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_crnet.checkpoint.directory import checkpoint_name, saved_step
from megatron_crnet.checkpoint.train_state import TrainingState
from megatron_crnet.config.schema import FaultsConfig
from megatron_crnet.training.callbacks.base import Callback
from megatron_crnet.training.callbacks.checkpoints import settle
from megatron_crnet.utils.errors import BadStepError, CheckpointError

if TYPE_CHECKING:
    from megatron_crnet.training.trainer import Trainer


NOTHING_TRAINED = "the global batch holds no token whose loss counts, but must hold one"
"""Such as ends of documents alone under data.eod_mask_loss: there is no mean loss and no gradient."""


def losses_to_remember(faults: FaultsConfig) -> int:
    """Number of losses of good steps that `detect_anomaly` compares with."""
    return 0 if faults.spike_deviations is None else faults.spike_window


def detect_anomaly(loss: float, recent: Sequence[float], faults: FaultsConfig) -> str | None:
    """Why a step with this loss is bad; None for a good one.

    Args:
        recent: losses of the good steps before it, at most spike_window.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}, but must be finite"
    if faults.spike_deviations is None or len(recent) < faults.spike_window:
        return None
    limit = statistics.fmean(recent) + faults.spike_deviations * statistics.pstdev(recent)
    if loss <= limit:
        return None
    return (
        f"the loss is {loss:.4f}, but faults.spike_deviations {faults.spike_deviations:g} above the last "
        f"{len(recent)} losses is {limit:.4f}"
    )


def skip_limit_exceeded(state: TrainingState, faults: FaultsConfig) -> str | None:
    """The limit on skipped steps that `state` exceeds; None while it is within them."""
    for name, count in (("max_skips_in_a_row", state.skipped_in_a_row), ("max_skips", state.skipped)):
        limit = getattr(faults, name)
        if count > limit:
            return f"step {state.step} would be skipped step {count} of at most faults.{name} {limit}"
    return None


class FaultPolicy(Callback):
    """Skips a bad step, or stops on every rank alike. The step has changed no weight; what led to it may have."""

    def on_bad_step(self, trainer: Trainer, problem: str, lr: float) -> None:
        """See Callback."""
        faults = trainer.config.faults
        skipped = trainer.state.skip_step(trainer.step_size)
        limit = skip_limit_exceeded(skipped, faults)
        if faults.on_bad_step == "stop" or limit is not None:
            _stop(trainer, problem if faults.on_bad_step == "stop" else f"{problem}, and {limit}", lr)
        trainer.state = skipped
        trainer.metrics.write(skipped.step, {"skipped_steps": skipped.skipped})
        trainer.progress.line(
            f"warning: step {skipped.step} is skipped: {problem} (learning rate {lr:.3e}); {skipped.skipped} of at "
            f"most faults.max_skips {faults.max_skips}"
        )


def _stop(trainer: Trainer, problem: str, lr: float) -> None:
    """End the run with the state before the bad step saved, but not as one to continue from.

    The next start goes back to a checkpoint whose next step was good.
    """
    state, checkpointer = trainer.state, trainer.checkpointer
    back, stuck = None, ""
    try:  # whatever fails here must not hide what was wrong with the step
        settle(trainer)
        back = checkpointer.step_back(state.good_step)
    except CheckpointError as error:
        stuck = (
            f"checkpoints of step {state.good_step} and later could not be set aside ({error}): rename them, or a new "
            "start continues from the newest"
        )
    try:
        checkpointer.save(state, aside=True)
        aside = checkpointer.wait()
        kept = f"is kept beside it as {aside.name}" if aside else "is not kept"
    except CheckpointError as error:
        aside, kept = None, f"is lost ({error})"
    norm = "none yet" if trainer.engine.last_grad_norm is None else f"{trainer.engine.last_grad_norm:.4g}"
    skipping = "" if trainer.config.faults.on_bad_step == "skip" else ", or skip such steps (faults.on_bad_step skip)"
    # a segment that exceeds its tolerance gives NaN (docs/recomputation.md)
    inverts = trainer.config.recompute.traits.inverts
    remedy = ", or take recompute.strategy replay, which divides by no beta" if inverts else ""
    problem = f"{problem} at step {state.step + 1} (learning rate {lr:.3e}, last gradient norm {norm})"
    raise BadStepError(
        f"{problem}: lower optimizer.lr or look at the data of this step{skipping}{remedy}; "
        f"{stuck or _next_start(state, back, aside)}; the state just before this step {kept}",
        problem,
    )


def _next_start(state: TrainingState, back: Path | None, aside: Path | None) -> str:
    """What a new start does after a bad step."""
    if back is not None:
        no_older = ", as there is none before it" if saved_step(back) >= state.good_step else ""
        return f"a new start continues from {back}{no_older}"
    if aside is None:
        return "there is no checkpoint to continue from"
    name = checkpoint_name(state.step)
    return f"there is no checkpoint: rename {aside.name} to {name} to continue from it, or move it away to start anew"
