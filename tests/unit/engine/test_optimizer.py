from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from megatron_crnet.engine.optimizer import build_adamw, build_scheduler, parameter_groups
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


def _shapes(*, partial_apart: bool, **parameters: torch.Tensor) -> list[tuple[float, list[int]]]:
    """Weight decay and numbers of elements of every group; parameters named partial... have partial gradients."""
    module = torch.nn.ParameterDict(parameters)
    for name, parameter in module.items():
        parameter.sequence_parallel = name.startswith("partial")
    groups = parameter_groups([module], weight_decay=0.1, partial_apart=partial_apart)
    return [(g["weight_decay"], sorted(p.numel() for p in g["params"])) for g in groups]


LOW_RANK = {
    "matrix": torch.zeros(2, 2),
    "partial_matrix": torch.zeros(4, 4),
    "partial_norm": torch.zeros(2),
    "beta": torch.zeros(3),
}
FULL_RANK = {"matrix": torch.zeros(2, 2), "partial_norm": torch.zeros(2)}


def test_only_matrices_decay() -> None:
    assert _shapes(partial_apart=False, **LOW_RANK) == [(0.0, [2, 3]), (0.1, [4, 16])]


def test_partial_gradients_get_groups_of_their_own() -> None:
    assert _shapes(partial_apart=True, **LOW_RANK) == [(0.0, [3]), (0.0, [2]), (0.1, [4]), (0.1, [16])]


def test_every_pipeline_stage_has_the_same_groups_whatever_its_layers() -> None:
    low, full = _shapes(partial_apart=False, **LOW_RANK), _shapes(partial_apart=False, **FULL_RANK)
    assert [decay for decay, _ in low] == [decay for decay, _ in full] == [0.0, 0.1]


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_masters_get_an_optimizer_that_works_on_the_host(
    offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    apex = types.SimpleNamespace(FusedAdam=lambda groups, **_: "apex")
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    parameters = [{"params": [torch.zeros(1, requires_grad=True)]}]
    found = build_adamw(parameters, tiny_config().optimizer, on_host=offload)
    if offload:
        assert type(found) is torch.optim.AdamW
        assert not found.defaults["fused"]
    else:
        assert found == "apex"
