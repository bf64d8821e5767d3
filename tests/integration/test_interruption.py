"""A run that is stopped by signals, by the clock's saves or by an agent's death goes on as if nothing had happened."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_crnet.utils.signals import REPEAT_SECONDS
from tests.integration.conftest import LIMIT_S, Corpus, lines_of, start
from tests.integration.processes import lines_so_far, rank_below, start_agent, start_rank, wait_for_step, wait_until
from tests.ports import free_ports


def long_options(corpus: Corpus, output: Path, **changes: object) -> list[str]:
    """Some steps into the second epoch of a blend; validation takes much of the time, so that signals come in it."""
    options = {
        "data__train_data_path": f"[0.9,{corpus.train},0.1,{corpus.valid}]",
        "training__train_steps": 52,
        "training__global_batch_size": 16,
        "training__micro_batch_size": 8,
        "training__eval_interval": 10,
        "training__eval_steps": 6,
        "logging__log_interval": 7,
    }
    return corpus.options(output, **{**options, **changes})


def metrics(output: Path) -> dict[str, dict[int, float]]:
    return {key: lines_of(output, key) for key in ("loss", "grad_norm", "lr", "tokens", "validation_loss")}


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    """What two ranks report that nobody disturbs."""
    output = tmp_path_factory.mktemp("whole") / "run"
    result = start(long_options(corpus, output), ranks=2)
    assert result.returncode == 0, result.stderr
    return metrics(output)


def test_a_signal_to_one_rank_saves_on_all_and_the_run_goes_on_as_if_nothing_had_happened(
    corpus: Corpus, tmp_path: Path, whole: dict[str, dict[int, float]]
) -> None:
    port, output = free_ports(1), tmp_path / "run"
    options = long_options(corpus, output)
    ranks = [start_rank(rank, port, options) for rank in range(2)]
    wait_for_step(output, 14, ranks)
    ranks[1].send_signal(signal.SIGUSR1)
    printed = [process.communicate(timeout=LIMIT_S) for process in ranks]
    assert [process.returncode for process in ranks] == [75, 75], printed
    (left,) = (output / "checkpoints").glob("step_*")
    step = int(left.name.removeprefix("step_"))
    assert 14 <= step < 52
    assert (
        f"stopped by a callback or a signal to another rank after step {step}; the same command goes on from"
        in printed[0][0]
    )
    assert json.loads((left / "state.json").read_text())["step"] == step
    result = start(options, ranks=2)
    assert result.returncode == 0, result.stderr
    assert f"continuing from {left}, step {step}" in result.stdout
    assert metrics(output) == whole


def test_the_agent_passes_the_warning_on_and_another_layout_goes_on(
    corpus: Corpus, tmp_path: Path, whole: dict[str, dict[int, float]]
) -> None:
    output = tmp_path / "run"
    options = long_options(corpus, output, checkpoint__save_interval_minutes=0.003, checkpoint__keep_last=2)
    agent = start_agent(options)
    # two saves by the clock
    wait_until(lambda: len(lines_so_far(output, "checkpoint_wait_s")) >= 2, [agent])
    agent.send_signal(signal.SIGTERM)
    printed, _ = agent.communicate(timeout=LIMIT_S)
    assert agent.returncode == 75, printed
    assert "stopped by SIGTERM after step" in printed
    assert len(list((output / "checkpoints").glob("step_*"))) == 2
    # the state at the stop is saved: by the signal, or by the clock after the same step
    assert f"stopped by SIGTERM after step {max(lines_of(output, 'checkpoint_wait_s'))};" in printed
    # under another layout: no sample is lost or comes twice, or the losses would not be the same
    layout = {"parallel__tensor_model_parallel_size": 2, "recompute__strategy": "full"}
    result = start(long_options(corpus, output, **layout), ranks=2)
    assert result.returncode == 0, result.stderr
    found = metrics(output)
    assert found["tokens"] == whole["tokens"]
    for key, values in whole.items():
        assert found[key] == pytest.approx(values, rel=1e-4), key


def test_a_second_signal_ends_a_rank_that_waits_in_vain(corpus: Corpus, tmp_path: Path) -> None:
    port, output = free_ports(1), tmp_path / "run"
    options = corpus.options(output, training__train_steps=100000, checkpoint__save_interval=2)
    ranks = [start_rank(rank, port, options) for rank in range(2)]
    try:
        wait_for_step(output, 3, ranks)
        ranks[1].send_signal(signal.SIGSTOP)
        ranks[0].send_signal(signal.SIGTERM)
        time.sleep(REPEAT_SECONDS + 0.5)
        assert ranks[0].poll() is None
        ranks[0].send_signal(signal.SIGTERM)
        # a first one that a busy machine took late is the same warning as the second: then a third counts
        with suppress(subprocess.TimeoutExpired):
            ranks[0].wait(timeout=10)
        ranks[0].send_signal(signal.SIGTERM)
        _, printed = ranks[0].communicate(timeout=LIMIT_S)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert ranks[0].returncode == 128 + signal.SIGTERM
    assert "SIGTERM again: this rank ends at once; the last checkpoint is whole (rank 0)" in printed


def test_the_agent_lets_a_rank_that_is_left_alone_say_who_is_gone(corpus: Corpus, tmp_path: Path) -> None:
    output = tmp_path / "run"
    agent = start_agent(corpus.options(output, training__train_steps=100000, training__eval_steps=0))
    wait_for_step(output, 3, [agent])
    rank_below(agent, 1).kill()
    printed, _ = agent.communicate(timeout=LIMIT_S)
    assert agent.returncode == 128 + signal.SIGKILL, printed
    assert "gone: rank 1; this is rank 0 at step" in printed
    assert (output / "stacks" / "rank_00000.txt").stat().st_size
