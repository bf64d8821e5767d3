"""Options of the optimizer that have no effect are named; `test_schema.py` has what is refused."""

from __future__ import annotations

import pytest

from megatron_crnet.config.optimizer_rules import READ_UNDER, remark_on_unread
from megatron_crnet.config.schema import OptimizerConfig

RESTARTS = {"lr_decay_style": "cosine_restarts", "lr_restart_interval": 5}


@pytest.mark.parametrize(
    ("options", "remark"),
    [
        ({}, ""),
        ({"lr": 0.5, "adam_eps": 1e-4}, ""),
        ({"name": "galore", "galore_rank": 8}, ""),
        (RESTARTS, ""),
        ({"galore_rank": 8}, "optimizer.galore_rank not read: that is for galore"),
        (
            {**RESTARTS, "lr_decay_style": "cosine"},
            "optimizer.lr_restart_interval not read: that is for cosine_restarts",
        ),
        (
            {"proj_type": "left", "lr_wsd_decay_steps": 3},
            "optimizer.lr_wsd_decay_steps, optimizer.proj_type not read: these are for galore and wsd",
        ),
    ],
)
def test_what_has_no_effect_is_named(options: dict[str, object], remark: str) -> None:
    assert remark_on_unread(OptimizerConfig(**options)) == remark  # type: ignore[arg-type]


def test_every_field_that_is_read_under_a_choice_is_a_field() -> None:
    assert set(READ_UNDER) <= set(vars(OptimizerConfig()))
