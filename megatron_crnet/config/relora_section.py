"""The `relora` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_crnet.config.field_types import Count, LearningRate, PositiveCount, Section, Share


@dataclass(frozen=True)
class ReloraConfig(Section, name="relora"):
    """Restarts of `model.variant` relora (docs/methods.md)."""

    restart_interval: PositiveCount | None = None
    """Steps between restarts: W += s A B in fp32, A is drawn anew, B = 0, moments of both are pruned. null: none, which
    is LoRA's pre-training."""
    prune: Literal["magnitude", "random", "reset"] = "magnitude"
    """Which entries of each moment of each A and B a restart zeroes: a share of them, the smallest or random ones; or
    all."""
    prune_share: Share = 0.9
    """The share, for magnitude and random."""
    warm_start_steps: Count = 0
    """First steps of the run that train full-rank weights, which are frozen then. The schedule and Adam begin anew
    after them."""
    warm_start_lr: LearningRate | None = None
    """Peak learning rate of the warm start, whose schedule is that of a full-rank run of train_steps; null means half
    of optimizer.lr, the authors' rule."""
