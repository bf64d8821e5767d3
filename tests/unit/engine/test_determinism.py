"""`training.deterministic`: what it switches on, and that it leaves the process as it was. No GPU has run it."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_crnet.config.megatron import build_transformer_config
from megatron_crnet.engine.determinism import ENVIRONMENT, deterministic_algorithms
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import tiny_config


def state() -> tuple[object, ...]:
    flags = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    return torch.are_deterministic_algorithms_enabled(), *flags, *(os.environ.get(name) for name in ENVIRONMENT)


@pytest.mark.fault("B8")
def test_libraries_are_told_before_they_start_and_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    before = state()
    with deterministic_algorithms(True):
        assert state() == (True, False, False, ":4096:8", "Ring", "0")
    assert state() == before
    with deterministic_algorithms(False):
        assert state() == before


@pytest.mark.fault("B8")
@pytest.mark.parametrize(
    ("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_ALGO", "NVLS"), ("NCCL_ALGO", "^Ring")]
)
def test_an_environment_that_asks_for_the_contrary_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    for other in ENVIRONMENT:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    before = state()
    with pytest.raises(ConfigError, match=f"but {name} is "), deterministic_algorithms(True):
        pass
    assert state() == before


@pytest.mark.fault("B8")
def test_megatron_core_is_told_as_well() -> None:
    assert build_transformer_config(tiny_config(training={"deterministic": True})).deterministic_mode
    assert not build_transformer_config(tiny_config()).deterministic_mode
