from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_crnet.config.loading import load_config, resolved
from megatron_crnet.config.phases import next_model, phase_at, phases_of, planned_phases, saved_model
from megatron_crnet.config.schema import Config
from megatron_crnet.utils.errors import ConfigError

STEPS = 20
WIDE = {"q": 12, "k": 12, "v": 8, "o": 12, "gate": 12, "up": 12, "down": 12}


def config_of(model: dict[str, Any] | None = None, **schedule: Any) -> Config:
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_layers": 2, "rank": 8, "vocab_size": 64}
    return load_config(
        {
            "model": {**small, **(model or {})},
            "training": {"train_steps": STEPS},
            "optimizer": {"lr_warmup_steps": 1},
            "rank_schedule": schedule,
        }
    )


def by_energy(model: dict[str, Any] | None = None, **changes: Any) -> Config:
    return config_of(model, **{"ranks": [4, 16], "energy": 0.9, "check_interval": 5, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"energy": 0}, "rank_schedule.energy is 0, but must be a finite number above 0 and up to 1"),
        ({"energy": 1.01}, "rank_schedule.energy is 1.01, but must be"),
        ({"energy": "much"}, "rank_schedule.energy is"),
        ({"check_interval": 0}, "rank_schedule.check_interval is 0, but must be an integer from 1"),
        ({"check_interval": None}, "energy is 0.9 and rank_schedule.check_interval not set, but"),
        ({"energy": None}, "energy is not set and rank_schedule.check_interval 5, but"),
        ({"check_interval": STEPS}, "check_interval 20 is not below training.train_steps 20"),
        ({"steps": [2, 4]}, r"steps \[2, 4\] and rank_schedule.energy 0.9 are both set"),
        ({"ranks": []}, r"energy 0.9 is set, but rank_schedule.ranks is \[\]"),
        ({"ranks": [4, 4]}, "ranks change no rank in entry 2: leave that entry out"),
        ({"ranks": [{**WIDE, "v": 7}]}, "let some maps grow and others shrink in entry 1"),
        ({"energy": 0.5}, "energy 0.5 lets no rank grow in entry 2"),
        ({"ranks": [[4]]}, "ranks has an entry that cannot be model.rank"),
        ({"model": {"variant": "cola"}}, "shrink in entry 1, but between the factors of cola stands silu"),
        ({"model": {"variant": "full_rank"}}, "energy 0.9 is set, but model.variant full_rank has no factors"),
        ({"model": {"variant": "relora"}}, "energy 0.9 is set, but model.variant relora has restarts of its own"),
    ],
    ids=str,
)
def test_what_no_energy_can_decide_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        by_energy(**changes)
    assert "\n" not in str(found.value)


def test_ranks_at_given_steps_change_some_rank_and_fit_the_model() -> None:
    with pytest.raises(ConfigError, match=r"rank_schedule.ranks change no rank at step 5: leave that entry out"):
        config_of(ranks=[8], steps=[5])
    with pytest.raises(ConfigError, match=r"an entry that cannot be model.rank: model.rank is 33 for q of layer 1"):
        config_of(ranks=[33], steps=[5])


@pytest.mark.parametrize(
    "changes",
    [
        {"ranks": [WIDE]},
        {"energy": 1, "ranks": [4]},
        {"energy": 0.1, "ranks": [4]},
        {"model": {"variant": "cola"}, "ranks": [16]},
    ],
    ids=str,
)
def test_maps_may_stay_and_small_thresholds_are_for_shrinking(changes: dict[str, Any]) -> None:
    by_energy(**changes)


@pytest.mark.parametrize("changing", [by_energy(), config_of(ranks=[4], steps=[5])], ids=["energy", "steps"])
def test_a_state_on_disks_is_refused_before_the_first_change(changing: Config) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}
    with pytest.raises(ConfigError, match=r"offload_optimizer is .*, but rank_schedule changes .*: use device cpu"):
        dataclasses.replace(changing, deepspeed={"zero_optimization": zero})


def test_phases_follow_from_the_changes_so_far() -> None:
    config = by_energy()
    for changes, ranks in (((), [8]), ((5,), [8, 4]), ((5, 15), [8, 4, 16])):
        phases = phases_of(config, changes)
        assert [phase.config.model.rank for phase in phases] == ranks
        assert [(phase.start, phase.continues) for phase in phases] == [(0, False), *((at, True) for at in changes)]
        assert phases[-1].stop == STEPS
    assert phase_at(config, 4, (5,)).config.model.rank == 8
    assert phase_at(config, 5, (5,)).config.model.rank == 4
    assert [phase.config.model.rank for phase in planned_phases(config)] == [16]
    given = config_of(ranks=[4, 16], steps=[5, 15])
    assert planned_phases(given) == phases_of(given)
    assert phases_of(config, (5, 15)) == phases_of(given)


def test_spectra_are_measured_every_interval_until_the_last_change() -> None:
    config = by_energy()
    measured = {step: next_model(config, step, ()) for step in range(1, STEPS + 1)}
    assert [step for step, model in measured.items() if model] == [5, 10, 15]
    following = next_model(config, 10, (5,))
    assert following == dataclasses.replace(config.model, rank=16)
    assert next_model(config, 10, (5, 10)) is None
    assert next_model(config_of(ranks=[4], steps=[5]), 5, ()) is None


def test_the_model_of_a_checkpoint_follows_from_its_state() -> None:
    values = resolved(by_energy())
    for changes, rank in (([], 8), ([5], 4), ([5, 10], 16)):
        assert saved_model(values, {"step": 12, "rank_changes": changes}).rank == rank
    assert saved_model(values, {"step": 12}).rank == 8
    with pytest.raises(ConfigError, match=r"after the steps \[5, 10, 15\], but rank_schedule.ranks \[4, 16\] has"):
        saved_model(values, {"step": 15, "rank_changes": [5, 10, 15]})
    assert saved_model(resolved(config_of(ranks=[4], steps=[5])), {"step": 5, "rank_changes": []}).rank == 4
