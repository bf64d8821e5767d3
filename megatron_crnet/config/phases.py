"""The phases of a run, each trained by an engine of its own.

ReLoRA's warm start trains full-rank weights, what follows its frozen ones with factors; schedule and Adam's counts
begin anew (docs/decisions/relora.md). A rank schedule changes the ranks of the factors; schedule, moments and counts go
on (docs/decisions/rank_schedule.md). When it changes them by energy, the steps of the changes made so far are part of
a run's state (`TrainingState.rank_changes`), and its phases follow from both. Every other run has one phase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from megatron_crnet.config.model_size import total_parameters
from megatron_crnet.config.rank_section import RankScheduleConfig, rank_after
from megatron_crnet.config.schema import OF_VARIANT, Config, ModelConfig, ReloraConfig


@dataclass(frozen=True)
class Phase:
    """Consecutive steps that one engine trains.

    Attributes:
        config: what the engine is built from: the model of the phase, and a schedule whose first step is that after
            `start`.
        start, stop: steps of the run that are done before the phase, and with its last one.
        continues: moments, Adam's count and the learning-rate schedule are those of the phase before, gone on.
    """

    config: Config
    start: int
    stop: int
    continues: bool = False

    @property
    def schedule_start(self) -> int:
        """Steps of the run that are done at the first one of the learning-rate schedule."""
        return 0 if self.continues else self.start


def phases_of(config: Config, changes: Sequence[int] = ()) -> list[Phase]:
    """The phases of a run, in order.

    Args:
        changes: steps after which `rank_schedule.energy` has changed ranks so far; the last phase goes on to the next.
    """
    relora, warm, steps = config.relora, config.relora.warm_start_steps, config.training.train_steps
    if warm == 0:
        return _rank_phases(config, changes)
    optimizer = config.optimizer
    style = "cosine" if optimizer.lr_decay_style == "cosine_restarts" else optimizer.lr_decay_style
    dense = replace(
        config,
        model=dense_model(config.model),
        optimizer=replace(optimizer, lr=relora.warm_start_lr or optimizer.lr / 2, lr_decay_style=style),
        relora=ReloraConfig(),
    )
    # steps that are profiled are the loop's business, and numbered over the whole run
    low_rank = replace(
        config,
        training=replace(config.training, train_steps=steps - warm),
        relora=replace(relora, warm_start_steps=0, warm_start_lr=None),
        logging=replace(config.logging, profile_steps=None),
    )
    return [Phase(dense, 0, warm), Phase(low_rank, warm, steps)]


def _rank_phases(config: Config, changes: Sequence[int]) -> list[Phase]:
    schedule, phases = config.rank_schedule, list[Phase]()
    if not schedule.ranks:
        return [Phase(config, 0, config.training.train_steps)]
    steps = schedule.steps if schedule.energy is None else changes
    for start, stop in pairwise([0, *steps, config.training.train_steps]):
        model = replace(config.model, rank=rank_after(config.model.rank, schedule, start, changes))
        of_phase = replace(config, model=model, rank_schedule=RankScheduleConfig())
        phases.append(Phase(of_phase, start, stop, continues=start > 0))
    return phases


def with_largest_ranks(config: Config) -> Config:
    """The configuration of a run that has, from its first step to its last, those ranks of its schedule with which the
    model is largest."""
    if not config.rank_schedule.ranks:
        return config
    ranks = [config.model.rank, *config.rank_schedule.ranks]
    largest = max((replace(config.model, rank=rank) for rank in ranks), key=total_parameters)
    return replace(config, model=largest, rank_schedule=RankScheduleConfig())


def planned_phases(config: Config) -> list[Phase]:
    """The phases of a run that is not trained yet. When `rank_schedule.energy` will change ranks nobody knows, so that
    all its steps have the largest ones."""
    return phases_of(config if config.rank_schedule.energy is None else with_largest_ranks(config))


def next_model(config: Config, step: int, changes: Sequence[int]) -> ModelConfig | None:
    """The model with the ranks to come, where the spectra are measured after `step` to decide on them, else None.

    Args:
        changes: as in `phases_of`.
    """
    schedule, done = config.rank_schedule, len(changes)
    if schedule.energy is None or done == len(schedule.ranks) or step == config.training.train_steps:
        return None
    is_due = step % (schedule.check_interval or 1) == 0
    return replace(config.model, rank=schedule.ranks[done]) if is_due else None


def dense_model(model: ModelConfig) -> ModelConfig:
    """The full-rank model of the same shape."""
    return replace(model, variant="full_rank", **OF_VARIANT)


def phase_at(config: Config, step: int, changes: Sequence[int] = ()) -> Phase:
    """The phase whose state a run has after `step`: at the end of a phase, that of the next.

    Args:
        changes: as in `phases_of`.
    """
    phases = phases_of(config, changes)
    return next((phase for phase in phases if step < phase.stop), phases[-1])


def change_of_model(before: Phase, after: Phase) -> str:
    """What another phase trains, for the log."""
    models = before.config.model, after.config.model
    if models[0].variant != models[1].variant:
        return f"from here {models[1].variant} is trained"
    counts = [total_parameters(model) / 1e6 for model in models]
    return f"ranks change, parameters {counts[0]:.3g}M -> {counts[1]:.3g}M"


def is_warm_start(values: Mapping[str, Any], step: int) -> bool:
    """Whether a run of these resolved values has the weights of its warm start after `step`."""
    return step < (values.get("relora") or {}).get("warm_start_steps", 0)


def saved_model(values: Mapping[str, Any], state: Mapping[str, Any]) -> ModelConfig:
    """The model whose weights a checkpoint holds.

    Args:
        values: the run's resolved configuration, which an earlier version may have written.
        state: its state.json.
    """
    model, step = ModelConfig(**values["model"]), state["step"]
    rank = rank_after(model.rank, values.get("rank_schedule"), step, state.get("rank_changes", ()))
    model = replace(model, rank=rank)
    return dense_model(model) if is_warm_start(values, step) else model
