"""The `rank_schedule` section: ranks that change in the course of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Le

from megatron_crnet.config.field_types import SMALLEST, PositiveCount, Section
from megatron_crnet.config.positions import Rank
from megatron_crnet.utils.errors import require


@dataclass(frozen=True)
class RankScheduleConfig(Section, name="rank_schedule"):
    """Ranks that change at given steps, or when energy crosses a threshold (docs/decisions/rank_schedule.md)."""

    steps: list[PositiveCount] = field(default_factory=list)
    """Steps after which ranks change, ascending; until the first, they are model.rank. []: they never change."""
    ranks: list[Rank] = field(default_factory=list)
    """The ranks from each of these changes on, in the forms of model.rank. A map that grows computes what it did; one
    that shrinks keeps the best approximation of its product A B."""
    energy: Annotated[float, Ge(SMALLEST), Le(1)] | None = None
    """Instead of steps: the share of the energy (squared singular values of A B, summed over all maps of a change) at
    which each change comes. Ranks shrink as soon as the best approximation of the next ranks keeps at least this share,
    and grow as soon as the leading half of each present rank (rounded up) holds at most this share."""
    check_interval: PositiveCount | None = None
    """Steps between measurements of that energy."""


def rank_after(
    model_rank: Rank,
    schedule: Mapping[str, Any] | RankScheduleConfig | None,
    step: int,
    changes: Sequence[int] = (),
) -> Rank:
    """The ranks of the weights that a run has after `step`.

    Args:
        schedule: the section, or its resolved values, which an earlier version's run does not have.
        changes: `TrainingState.rank_changes`: steps after which `energy` has changed ranks.

    Raises:
        ConfigError: it has done so more often than the section has changes.
    """
    values = vars(schedule) if isinstance(schedule, RankScheduleConfig) else schedule or {}
    ranks, steps = values.get("ranks") or [], values.get("steps") or []
    done = sum(change <= step for change in (steps if values.get("energy") is None else changes))
    require(
        done <= len(ranks),
        f"ranks have changed after the steps {list(changes)}, but rank_schedule.ranks {ranks} has {len(ranks)} "
        "entries: list the ranks of these changes first, and then those of later ones",
    )
    return ranks[done - 1] if done else model_rank
