"""Which steps would do harm, and how many of them may be passed over (the `faults` section)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from megatron_crnet.checkpoint.train_state import TrainingState
from megatron_crnet.config.schema import FaultsConfig

NOTHING_TRAINED = "the global batch holds no token whose loss counts, but must hold one"
"""Such as ends of documents alone under data.eod_mask_loss: there is no mean loss and no gradient."""


def losses_to_remember(faults: FaultsConfig) -> int:
    """How many losses of good steps `problem_of_loss` compares with."""
    return 0 if faults.spike_deviations is None else faults.spike_window


def problem_of_loss(loss: float, recent: Sequence[float], faults: FaultsConfig) -> str | None:
    """Why a step of this loss must not change weights; None for a good one.

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


def passed_limit(state: TrainingState, faults: FaultsConfig) -> str | None:
    """The limit on skipped steps that `state` has passed; None while it is within them."""
    for name, count in (("max_skips_in_a_row", state.skipped_in_a_row), ("max_skips", state.skipped)):
        limit = getattr(faults, name)
        if count > limit:
            return f"step {state.step} would be skipped step {count} of at most faults.{name} {limit}"
    return None
