from __future__ import annotations

import math

import pytest
import torch

from megatron_crnet.optimizer import build_adamw, build_scheduler, parameter_groups
from tests.helpers import tiny_config


def _rates(steps: int, **optimizer: object) -> list[float]:
    config = tiny_config(training={"train_steps": steps}, optimizer={"lr": 1.0, **optimizer})
    adamw = build_adamw([{"params": [torch.zeros(1, requires_grad=True)]}], config.optimizer)
    scheduler, rates = build_scheduler(config, adamw), []
    for _ in range(steps):
        rates.append(adamw.param_groups[0]["lr"])
        scheduler.step(1)
    return rates


def test_cosine_warms_up_and_ends_at_the_minimum() -> None:
    rates = _rates(100, lr_warmup_steps=10, min_lr_ratio=0.1)
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * (k - 10) / 90)) for k in range(11, 101)]
    assert rates[10:] == pytest.approx(expected)


def test_warmup_stable_decay_is_flat_then_falls() -> None:
    rates = _rates(100, lr_decay_style="wsd", lr_warmup_steps=10, lr_wsd_decay_steps=20, min_lr_ratio=0.0)
    assert rates[10:80] == pytest.approx([1.0] * 70)
    assert rates[80:] == pytest.approx([1 - (k + 1) / 20 for k in range(20)])


def test_constant_stays() -> None:
    assert _rates(20, lr_decay_style="constant", lr_warmup_steps=0) == pytest.approx([1.0] * 20)


def test_only_matrices_decay_and_partial_gradients_have_groups_of_their_own() -> None:
    module = torch.nn.ParameterDict(
        {"matrix": torch.zeros(2, 2), "norm": torch.zeros(2), "beta": torch.zeros(3), "partial": torch.zeros(4, 4)}
    )
    module["partial"].sequence_parallel = True
    groups = parameter_groups([module], weight_decay=0.1)
    by_numel = {
        p.numel(): (g["weight_decay"], g["wd_mult"], g["tensor_parallel_partial"]) for g in groups for p in g["params"]
    }
    assert by_numel == {4: (0.1, 1.0, False), 2: (0.0, 0.0, False), 3: (0.0, 0.0, False), 16: (0.1, 1.0, True)}
