"""Training as a call of a function: what it returns, and that it leaves the process as it was."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_crnet.config.loading import read_config
from megatron_crnet.distributed import cpu_backend
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.training.trainer import TrainResult, run_training
from megatron_crnet.utils.errors import ConfigError
from megatron_crnet.utils.signals import SIGNALS
from tests.integration.conftest import Corpus, lines_of


def process_state() -> tuple[Any, ...]:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    return handlers, dist.is_initialized(), {thread.name for thread in threading.enumerate()} & {"signals", "heartbeat"}


def test_a_run_returns_its_losses_and_gives_groups_signals_and_threads_back(corpus: Corpus, tmp_path: Path) -> None:
    cpu_backend.install()
    before = process_state()
    output = tmp_path / "run"
    config = read_config(corpus.options(output, data__test_data_path=f"[{corpus.train}]", training__test_steps=1))
    result = run_training(config)
    checkpoint = output / "checkpoints" / "step_00000006"
    losses = [lines_of(output, f"{name}loss")[6] for name in ("", "validation_", "test_")]
    assert result == TrainResult(True, 6, checkpoint, *losses)
    assert process_state() == before
    assert run_training(config) == TrainResult(True, 6, checkpoint)
    with pytest.raises(ConfigError, match=r"training\.global_batch_size 3 does not divide"):
        run_training(read_config(corpus.options(output, training__global_batch_size=3)))
    assert process_state() == before


def test_a_signal_is_reported_by_the_result(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = TrainEngine.update

    def signalled(self: TrainEngine) -> tuple[float, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return update(self)

    monkeypatch.setattr(TrainEngine, "update", signalled)
    before = process_state()
    config = read_config(corpus.options(tmp_path / "run", training__train_steps=10**6, training__eval_steps=0))
    result = run_training(config)
    assert (result.complete, result.checkpoint) == (False, tmp_path / "run" / "checkpoints" / f"step_{result.step:08d}")
    assert process_state() == before
