from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from megatron_crnet.checkpoint.train_state import TrainingState
from megatron_crnet.config.schema import FaultsConfig
from megatron_crnet.training.callbacks.faults import detect_anomaly, losses_to_remember, skip_limit_exceeded

GOOD: dict[str, Any] = {"samples": 8, "tokens": 100, "grad_norm": 0.5, "lr": 1e-3}
SPIKES = FaultsConfig(spike_deviations=3.0, spike_window=4)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_bad_whatever_came_before(loss: float) -> None:
    assert detect_anomaly(loss, (), FaultsConfig()) == f"the loss is {loss}, but must be finite"


def test_a_spike_is_so_many_deviations_above_the_mean_of_a_full_window() -> None:
    recent = (1.0, 3.0, 1.0, 3.0)  # mean 2, deviation 1
    assert detect_anomaly(4.99, recent, SPIKES) is None
    assert detect_anomaly(5.01, recent, SPIKES) == (
        "the loss is 5.0100, but faults.spike_deviations 3 above the last 4 losses is 5.0000"
    )
    assert detect_anomaly(99.0, recent[:3], SPIKES) is None
    assert detect_anomaly(-99.0, recent, SPIKES) is None
    assert detect_anomaly(99.0, recent, FaultsConfig()) is None


def test_both_limits_count_and_a_good_step_ends_a_row() -> None:
    faults = FaultsConfig(max_skips_in_a_row=2, max_skips=3)
    state = TrainingState().skip_step(8).skip_step(8)
    assert skip_limit_exceeded(state, faults) is None
    assert skip_limit_exceeded(state.skip_step(8), faults) == (
        "step 3 would be skipped step 3 of at most faults.max_skips_in_a_row 2"
    )
    state = state.trained(**GOOD, loss=2.0, window=0).skip_step(8)
    assert skip_limit_exceeded(state, faults) is None
    state = state.trained(**GOOD, loss=2.0, window=0).skip_step(8)
    assert skip_limit_exceeded(state, faults) == "step 6 would be skipped step 4 of at most faults.max_skips 3"
    assert state.good_step == 5
    assert (state.step, state.samples, state.tokens, state.skipped, state.skipped_in_a_row) == (6, 48, 200, 4, 1)


def test_the_state_remembers_what_spikes_are_compared_with_and_survives_json() -> None:
    state = TrainingState()
    for loss in (0.1, 0.2, 0.3):
        state = state.trained(**GOOD, loss=loss, window=2)
    assert state.recent_losses == (0.2, 0.3)
    assert (state.unlogged_loss, state.unlogged_steps) == (0.1 + 0.2 + 0.3, 3)
    again = TrainingState.from_values(json.loads(json.dumps({**dataclasses.asdict(state), "layout": {}})))
    assert again == state
    assert state.logged().unlogged_steps == 0
    assert state.trained(**GOOD, loss=2.0, window=losses_to_remember(FaultsConfig())).recent_losses == ()
    assert losses_to_remember(SPIKES) == 4


def test_counters_of_an_older_checkpoint_start_anew() -> None:
    assert TrainingState.from_values({"step": 5, "tokens": 7, "samples": 9}) == TrainingState(5, 7, 9)
