"""ZeRO 0 to 3 on two data-parallel ranks: loss, gradient norm, every gradient and the updated weights."""

from __future__ import annotations

from itertools import product

import pytest

from tests.distributed.spawn import fresh_world, run_distributed
from tests.helpers import Errors, compare_with_reference, tiny_config

STAGES = (0, 1, 2, 3)
DTYPES = ("fp32", "bf16")
# what bf16 gives here over three steps: every weight and activation is rounded to 8 bits (4e-3), and the worst
# single weight's gradient is that of a small one; a factor of two anywhere would be far outside
BF16_BOUNDS = Errors(loss=1e-2, grad_norm=5e-2, gradients=0.4, parameters=3e-2)


def _rows() -> dict[tuple[int, str], Errors]:
    rows = {}
    for stage, dtype in product(STAGES, DTYPES):
        config = tiny_config(training={"dtype": dtype}, deepspeed_section={"zero_optimization": {"stage": stage}})
        rows[stage, dtype] = compare_with_reference(config)
        fresh_world()
    return rows


@pytest.fixture(scope="module")
def errors() -> dict[tuple[int, str], Errors]:
    return run_distributed(_rows, 2)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_fp32_equals_plain_training_to_rounding(errors: dict[tuple[int, str], Errors], stage: int) -> None:
    assert errors[stage, "fp32"].worst() < 1e-5, errors[stage, "fp32"]


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_stays_within_what_bf16_gives(errors: dict[tuple[int, str], Errors], stage: int) -> None:
    found = errors[stage, "bf16"]
    for name in ("loss", "grad_norm", "gradients", "parameters"):
        assert getattr(found, name) < getattr(BF16_BOUNDS, name), found
