"""Rules on ranks that change: the section `rank_schedule` fits the model and the run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from megatron_crnet.config.positions import METHODS, PositionTable, position_table
from megatron_crnet.utils.errors import ConfigError, require

if TYPE_CHECKING:
    from megatron_crnet.config.rank_section import RankScheduleConfig
    from megatron_crnet.config.schema import Config

FLAT = 0.5
"""Least share of the energy that the leading half of the ranks can hold."""


def directions(before: PositionTable, after: PositionTable) -> set[bool]:
    """Whether maps grow, of those whose ranks differ."""
    ranks = ((old[p], new[p]) for old, new in zip(before.ranks, after.ranks, strict=True) for p in old)
    return {new > old for old, new in ranks if new != old}


def check_rank_schedule(config: Config) -> None:
    """Every change of ranks falls between two steps, and fits the model.

    Raises:
        ConfigError: one does not.
    """
    schedule, model = config.rank_schedule, config.model
    by_energy = schedule.energy is not None
    _check_times(schedule, config.training.train_steps)
    if not schedule.ranks:
        return
    shown = f"rank_schedule.{f'energy {schedule.energy}' if by_energy else f'steps {schedule.steps}'}"
    method = METHODS[model.variant]
    require(
        not (method.is_full_rank or method.has_frozen),
        f"{shown} is set, but model.variant {model.variant} "
        f"{'has no factors' if method.is_full_rank else 'has restarts of its own'}: leave rank_schedule out",
    )
    try:
        tables = [position_table(replace(model, rank=rank)) for rank in (model.rank, *schedule.ranks)]
    except ConfigError as error:  # of one of the schedule's: that of model.rank has been checked
        raise ConfigError(f"rank_schedule.ranks has an entry that cannot be model.rank: {error}") from error
    for number, tables_of_change in enumerate(pairwise(tables)):
        found = directions(*tables_of_change)
        where = f"in entry {number + 1}" if by_energy else f"at step {schedule.steps[number]}"
        require(
            not (False in found and method.has_silu),
            f"rank_schedule.ranks shrink {where}, but between the factors of {model.variant} stands silu, so "
            "that no smaller factors have nearly the same product: let them grow only",
        )
        require(bool(found), f"rank_schedule.ranks change no rank {where}: leave that entry out")
        if by_energy:
            _check_threshold(schedule.energy or 0.0, found, where)


def _check_times(schedule: RankScheduleConfig, last: int) -> None:
    """Changes come at steps or by energy, and before the last step."""
    steps, energy, interval, ranks = schedule.steps, schedule.energy, schedule.check_interval, schedule.ranks
    require(
        not steps or energy is None,
        f"rank_schedule.steps {steps} and rank_schedule.energy {energy} are both set, but ranks change at given steps "
        "or by energy: leave one of the two out",
    )
    require(
        (energy is None) == (interval is None),
        f"rank_schedule.energy is {'not set' if energy is None else energy} and rank_schedule.check_interval "
        f"{'not set' if interval is None else interval}, but energy is measured every check_interval steps: set both "
        "or neither",
    )
    if interval is not None:
        require(
            bool(ranks),
            f"rank_schedule.energy {energy} is set, but rank_schedule.ranks is []: list the ranks to come",
        )
        require(
            interval < last,
            f"rank_schedule.check_interval {interval} is not below training.train_steps {last}, so that no rank would "
            "change: lower it",
        )
        return
    shown = f"rank_schedule.steps {steps}"
    require(
        len(steps) == len(ranks),
        f"{shown} has {len(steps)} entries and rank_schedule.ranks {len(ranks)}: give one of each per change",
    )
    require(
        not steps or (steps == sorted(set(steps)) and steps[-1] < last),
        f"{shown} must ascend and end below training.train_steps {last}: correct it",
    )


def _check_threshold(energy: float, found: set[bool], where: str) -> None:
    """One comparison decides on a change, and can: all its maps grow, or all shrink."""
    shown = f"rank_schedule.energy {energy}"
    require(
        len(found) == 1,
        f"rank_schedule.ranks let some maps grow and others shrink {where}, but {shown} is compared once for all of "
        "them: make two changes of it",
    )
    require(
        found == {False} or energy > FLAT,
        f"{shown} lets no rank grow {where}, because the leading half of the ranks always holds at least {FLAT} of the "
        f"energy: use more than {FLAT}",
    )
