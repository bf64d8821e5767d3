from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_crnet.config.loading import resolved
from megatron_crnet.model import compiled
from megatron_crnet.training import resumption
from megatron_crnet.training.resumption import PYTORCH, changed_glue, glue_in_use
from megatron_crnet.utils.versions import NOT_INSTALLED
from tests.helpers import tiny_config

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
VERSIONS = {"torch": "2.13.0", "triton": "3.7.1"}
KERNELS = "compiled kernels (torch 2.13.0, triton 3.7.1)"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "find_spec", lambda name: name)
    monkeypatch.setattr(resumption, "library_versions", lambda names: {name: VERSIONS[name] for name in names})


def saved(**training: Any) -> dict[str, Any]:
    return resolved(tiny_config(training=training))


def without_the_field() -> dict[str, Any]:
    values = saved()
    del values["training"]["cross_layer_fusion"]
    return values


def test_the_one_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert glue_in_use(tiny_config(), CUDA) == KERNELS
    assert glue_in_use(tiny_config(), CPU) == PYTORCH
    assert glue_in_use(tiny_config(training={"cross_layer_fusion": False}), CUDA) == PYTORCH
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    assert glue_in_use(tiny_config(), CUDA) == PYTORCH


@pytest.mark.parametrize(
    ("before", "versions", "named"),
    [
        (without_the_field(), {}, PYTORCH),
        (without_the_field(), VERSIONS, PYTORCH),
        (saved(cross_layer_fusion=False), VERSIONS, PYTORCH),
        (saved(), {**VERSIONS, "triton": NOT_INSTALLED}, PYTORCH),
        (saved(), {**VERSIONS, "triton": "2.0.0"}, "compiled kernels (torch 2.13.0, triton 2.0.0)"),
        (saved(), {**VERSIONS, "torch": "2.11.0"}, "compiled kernels (torch 2.11.0, triton 3.7.1)"),
        (saved(), {}, "compiled kernels (torch (unknown version), triton (unknown version))"),
    ],
)
def test_another_one_than_the_checkpoints_is_a_warning_on_cuda(
    before: dict[str, Any], versions: dict[str, str], named: str
) -> None:
    line = changed_glue(tiny_config(), CUDA, before, versions)
    assert line is not None
    assert f"computed by {named} until the checkpoint and is by {KERNELS}" in line
    assert changed_glue(tiny_config(), CPU, before, versions) is None
    assert changed_glue(tiny_config(model={"variant": "cola"}), CUDA, before, versions) is not None


def test_the_same_one_is_none() -> None:
    assert changed_glue(tiny_config(), CUDA, saved(), VERSIONS) is None
    plain = tiny_config(training={"cross_layer_fusion": False})
    for before in (without_the_field(), saved(cross_layer_fusion=False)):
        assert changed_glue(plain, CUDA, before, {**VERSIONS, "triton": "2.0.0"}) is None
