"""Training as a call of a function: what it returns, and that it leaves the process as it was."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from megatron_crnet.checkpoint import directory
from megatron_crnet.config.loading import read_config
from megatron_crnet.distributed import cpu_backend
from megatron_crnet.distributed.process_groups import all_groups
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.training.callbacks.base import Callback, Step
from megatron_crnet.training.trainer import Trainer, TrainResult, run_training
from megatron_crnet.utils.errors import ConfigError
from megatron_crnet.utils.signals import SIGNALS
from tests.integration.conftest import Corpus, lines_of, start

TWICE = """
import sys
from megatron_crnet import load_config, train
for name in ("one", "two"):
    assert train(load_config({}, [*sys.argv[2:], f"--logging.output_dir={sys.argv[1]}/{name}"])).complete
"""


def engines() -> int:
    """DeepSpeed's engines that are alive, each with a model, its optimizer and process groups."""
    gc.collect()
    return sum(isinstance(found, DeepSpeedEngine) for found in gc.get_objects())


def process_state() -> tuple[Any, ...]:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    return handlers, dist.is_initialized(), {thread.name for thread in threading.enumerate()} & {"signals", "heartbeat"}


def test_a_run_returns_its_losses_and_gives_groups_signals_and_threads_back(corpus: Corpus, tmp_path: Path) -> None:
    cpu_backend.install()
    before, held = process_state(), engines()
    output = tmp_path / "run"
    config = read_config(corpus.options(output, data__test_data_path=f"[{corpus.train}]", training__test_steps=1))
    result = run_training(config)
    checkpoint = output / "checkpoints" / "step_00000006"
    losses = [lines_of(output, f"{name}loss")[6] for name in ("", "validation_", "test_")]
    assert result == TrainResult(True, 6, checkpoint, *losses)
    assert (process_state(), engines()) == (before, held)
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


class StopsEarly(Callback):
    """Asks for a checkpoint of each step, and for a stop when it has seen two steps."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Step]] = []
        self.called: list[str] = []

    def wants_save(self) -> bool:
        return True

    def wants_stop(self) -> bool:
        return len(self.seen) == 2

    def on_start(self, trainer: Trainer) -> None:
        self.called.append("start")

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        self.seen.append((trainer.state.step, step))

    def on_stop(self, trainer: Trainer) -> None:
        self.called.append("stop")

    def on_complete(self, trainer: Trainer) -> None:
        self.called.append("complete")

    def on_end(self, trainer: Trainer) -> None:
        self.called.append("end")


def test_a_callback_sees_each_step_and_can_save_and_stop(corpus: Corpus, tmp_path: Path) -> None:
    callback = StopsEarly()
    result = run_training(read_config(corpus.options(tmp_path / "run")), callbacks=[callback])
    assert (result.complete, result.step) == (False, 3)
    assert callback.called == ["start", "stop", "end"]
    assert [(number, step.samples, step.tokens) for number, step in callback.seen] == [(n, 4, 128) for n in (1, 2, 3)]
    assert callback.seen[-1][1].loss == result.train_loss == lines_of(tmp_path / "run", "loss")[3]
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert saved == [f"step_{step:08d}" for step in (1, 2, 3)]


class StopsAndFails(Callback):
    """Stops the run at its first step, and then has a fault of its own."""

    def wants_stop(self) -> bool:
        return True

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        raise RuntimeError("a callback's fault")


def test_a_stopped_runs_state_is_saved_before_a_callback_can_fail(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a callback's fault"):
        run_training(read_config(corpus.options(tmp_path / "run")), callbacks=[StopsAndFails()])
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert saved.name == "step_00000001"


def test_two_ranks_train_twice(corpus: Corpus, tmp_path: Path) -> None:
    """A program of its own, which a launcher starts once."""
    program = tmp_path / "twice.py"
    program.write_text(TWICE)
    options = corpus.options(tmp_path / "unused", training__train_steps=2)
    done = start([str(tmp_path), *options], ranks=2, program=str(program))
    assert done.returncode == 0, done.stderr
    one, two = (lines_of(tmp_path / name, "loss") for name in ("one", "two"))
    assert one == two
    assert set(one) == {1, 2}


def test_two_runs_in_groups_of_the_caller(corpus: Corpus, tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = all_groups()
        losses = set()
        for name in ("one", "two"):
            config = read_config(corpus.options(tmp_path / name, training__train_steps=2))
            losses.add(run_training(config).train_loss)
            assert all_groups() == before, "each has threads and connections"
        with pytest.raises(ConfigError, match=r"checkpoint\.load"):
            run_training(read_config(corpus.options(tmp_path / "three", checkpoint__load=tmp_path / "none")))
        assert all_groups() == before
    finally:
        dist.destroy_process_group()
    assert len(losses) == 1


def test_a_test_that_was_cut_short_is_made_up_for(corpus: Corpus, tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = read_config(corpus.options(output, data__test_data_path=f"[{corpus.train}]", training__test_steps=1))
    loss = run_training(config).test_loss
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(line for line in lines if "test_loss" not in line))
    again = run_training(config)
    assert (again.complete, again.train_loss, again.test_loss) == (True, None, loss)
    assert lines_of(output, "test_loss") == {6: loss}
    assert run_training(config).test_loss is None, "nothing is left to do"


def test_a_checkpoint_that_fills_the_disk_is_whole_and_makes_room(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file `latest` finds no room until the checkpoint before the last two is gone."""
    folder, replace_text = tmp_path / "run" / "checkpoints", directory.replace_text

    def full(path: Path, text: str) -> None:
        if len(list(folder.glob("step_*"))) > 2:
            raise OSError(errno.ENOSPC, "no space")
        replace_text(path, text)

    monkeypatch.setattr(directory, "replace_text", full)
    options = corpus.options(tmp_path / "run", checkpoint__save_interval=1, checkpoint__keep_last=1)
    assert run_training(read_config(options)).complete
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000005", "step_00000006"]
    assert (folder / "latest").read_text() == "step_00000006\n"
