"""The counters of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class TrainingState:
    """What a run needs besides weights, moments and RNG states to resume.

    Attributes:
        step: steps done.
        tokens: trained tokens so far.
        samples: sequences drawn from the training data so far: its position in the order that Megatron-Core's
            datasets give all epochs and blended sources.
        skipped, skipped_in_a_row: bad steps that were skipped, in total and since the last good one.
        unlogged_loss, unlogged_steps: sum of the losses since the last metric line, and of how many good steps.
        unlogged_distillation: the same of the losses of distillation, by name.
        unlogged_routing: what routers have counted since the last metric line (`engine/expert_load.py`), when it was
            saved before the next.
        grad_norm, lr: of the last good step.
        recent_losses: of the last good steps, for what faults.spike_deviations compares with.
        restarts: ReLoRA's restarts so far, which number what they draw.
        rank_changes: steps after which rank_schedule.energy has changed ranks, in order.
        validation_due: a signal came before this step's validation was done.
    """

    step: int = 0
    tokens: int = 0
    samples: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    unlogged_loss: float = 0.0
    unlogged_steps: int = 0
    unlogged_distillation: dict[str, float] | None = None
    unlogged_routing: tuple[list[float], ...] | None = None
    grad_norm: float = 0.0
    lr: float = 0.0
    recent_losses: tuple[float, ...] = ()
    restarts: int = 0
    rank_changes: tuple[int, ...] = ()
    validation_due: bool = False

    @property
    def good_step(self) -> int:
        """The step after the last good one: what was saved later holds the same weights."""
        return self.step - self.skipped_in_a_row

    def trained(
        self,
        *,
        samples: int,
        tokens: int,
        loss: float,
        grad_norm: float,
        lr: float,
        window: int,
        distillation: Mapping[str, float] | None = None,
    ) -> TrainingState:
        """The state after a good step.

        Args:
            samples: sequences of the global batch.
            tokens: trained tokens of the global batch.
            loss: mean over them, nats.
            grad_norm: global gradient norm before clipping.
            lr: learning rate of the step.
            window: losses to remember.
            distillation: the step's losses of distillation by name.
        """
        losses, before = (*self.recent_losses, loss), self.unlogged_distillation or {}
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            samples=self.samples + samples,
            skipped_in_a_row=0,
            unlogged_loss=self.unlogged_loss + loss,
            unlogged_steps=self.unlogged_steps + 1,
            unlogged_distillation={name: before.get(name, 0.0) + value for name, value in (distillation or {}).items()},
            grad_norm=grad_norm,
            lr=lr,
            recent_losses=losses[max(len(losses) - window, 0) :],
        )

    def skip_step(self, samples: int) -> TrainingState:
        """The state after a skipped step: data and schedule have advanced, nothing else has."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + samples,
            skipped=self.skipped + 1,
            skipped_in_a_row=self.skipped_in_a_row + 1,
        )

    def logged(self) -> TrainingState:
        """The state after a metric line."""
        return replace(self, unlogged_loss=0.0, unlogged_steps=0, unlogged_distillation=None, unlogged_routing=None)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrainingState:
        """Inverse of `asdict`, after a JSON round trip; fields unknown to an older version keep their defaults."""
        known: dict[str, Any] = {
            field.name: tuple(value) if isinstance(value := values[field.name], list) else value
            for field in fields(cls)
            if field.name in values
        }
        return cls(**known)
