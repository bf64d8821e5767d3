"""The `rank_schedule` section: ranks that change in the course of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_crnet.config.field_types import PositiveCount, Section
from megatron_crnet.config.positions import Rank


@dataclass(frozen=True)
class RankScheduleConfig(Section, name="rank_schedule"):
    """Ranks of the low-rank maps that change at given steps (docs/decisions/rank_schedule.md)."""

    steps: list[PositiveCount] = field(default_factory=list)
    """Steps after which ranks change, ascending; until the first, they are model.rank. []: they never change."""
    ranks: list[Rank] = field(default_factory=list)
    """The ranks from each of these steps on, in the forms of model.rank. A map that grows computes what it did; one
    that shrinks keeps the best approximation of its product A B."""


def rank_after(model_rank: Rank, schedule: Mapping[str, Any] | RankScheduleConfig | None, step: int) -> Rank:
    """The ranks of the weights that a run has after `step`.

    Args:
        schedule: the section, or its resolved values, which an earlier version's run does not have.
    """
    if isinstance(schedule, RankScheduleConfig):
        changes, ranks = schedule.steps, schedule.ranks
    else:
        changes, ranks = (schedule or {}).get("steps") or [], (schedule or {}).get("ranks") or []
    done = sum(change <= step for change in changes)
    return ranks[done - 1] if done else model_rank
