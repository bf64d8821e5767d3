from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_crnet.config.recompute_section import RecomputeConfig
from megatron_crnet.config.schema import Config
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import tiny_config


def build(recompute: RecomputeConfig, section: Any = None) -> Config:
    deepspeed = {} if section is None else {"activation_checkpointing": section}
    return dataclasses.replace(tiny_config(), recompute=recompute, deepspeed=deepspeed)


REPLAY = RecomputeConfig(strategy="replay")
REFUSED: list[tuple[RecomputeConfig, Any, str]] = [
    (
        RecomputeConfig("replay", inverse_tolerance=0.1),
        None,
        "inverse_tolerance is 0.1, but recompute.strategy is replay, not inverse",
    ),
    (
        RecomputeConfig("full", keep_attention_output=True),
        None,
        "keep_attention_output is true, but recompute.strategy is full, not replay or inverse",
    ),
    (REPLAY, True, "must be a mapping"),
    (REPLAY, {"partitioned_activations": True}, "did you mean partition_activations"),
    (REPLAY, {"cpu_chekpointing": True}, "did you mean cpu_checkpointing"),
    (REPLAY, {"profile": 1}, "must be true or false"),
    (REPLAY, {"number_checkpoints": True}, "must be an integer"),
    (REPLAY, {"number_checkpoints": 4}, "contiguous_memory_optimization, which is off"),
    (REPLAY, {"contiguous_memory_optimization": True, "number_checkpoints": 4}, "needs partition_activations"),
    (REPLAY, {"contiguous_memory_optimization": True, "partition_activations": True}, "needs number_checkpoints"),
    (RecomputeConfig(), {"cpu_checkpointing": True}, "recompute.strategy none keeps nothing there"),
]


@pytest.mark.parametrize(("recompute", "section", "message"), REFUSED)
def test_what_cannot_be_honoured_is_refused(recompute: RecomputeConfig, section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(recompute, section)


@pytest.mark.parametrize(
    "section",
    [
        {"cpu_checkpointing": True, "profile": True, "synchronize_checkpoint_boundary": True},
        {"partition_activations": True, "contiguous_memory_optimization": True, "number_checkpoints": 4},
    ],
)
def test_what_can_be_honoured_is_accepted(section: dict[str, Any]) -> None:
    assert build(REPLAY, section).deepspeed == {"activation_checkpointing": section}


def test_switched_off_keys_need_no_strategy() -> None:
    build(RecomputeConfig(), {"cpu_checkpointing": False})
