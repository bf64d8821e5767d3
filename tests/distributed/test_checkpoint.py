"""State that several ranks save and load again: what a resumed run does, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from megatron.core import parallel_state

from megatron_crnet.checkpoint import TrainingState, check_resumable, load_checkpoint, save_checkpoint
from megatron_crnet.config import CheckpointConfig, Config
from megatron_crnet.engine import TrainEngine
from megatron_crnet.errors import CheckpointError, ConfigError
from megatron_crnet.gpt import build_model_chunks
from megatron_crnet.parallel import initialize_parallel
from megatron_crnet.settings import save_config
from tests.distributed.spawn import fresh_world, run_distributed
from tests.helpers import micro_batches, tiny_config

STEPS = 4
ROWS: dict[str, dict[str, Any]] = {
    "dp2-zero0-bf16": {"stage": 0, "dtype": "bf16"},
    "dp2-zero1": {"stage": 1},
    "dp2-zero1-bf16": {"stage": 1, "dtype": "bf16"},
    "dp2-zero3": {"stage": 3},
    "tp2-zero1": {"stage": 1, "parallel": {"tensor_model_parallel_size": 2}},
}
OTHER = {"adam_beta1": 0.5, "adam_beta2": 0.7, "adam_eps": 1e-3, "weight_decay": 0.3, "clip_grad": 0.25}


def row_config(
    folder: str,
    stage: int,
    dtype: str = "fp32",
    parallel: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **zero: Any,
) -> Config:
    section = {"zero_optimization": {"stage": stage, **zero}}
    config = tiny_config(
        parallel=parallel,
        training={"dtype": dtype, "train_steps": STEPS},
        optimizer=optimizer,
        deepspeed_section=section,
    )
    return dataclasses.replace(config, checkpoint=CheckpointConfig(dir=folder))


def train(
    config: Config, checkpoint: Path | None = None, save_at: int = 0, steps: int = STEPS
) -> tuple[list[tuple[float, float]], Any]:
    """Losses and gradient norms from the checkpoint, or from scratch, to the last step; the settings after it."""
    context = initialize_parallel(config)
    engine = TrainEngine(config, build_model_chunks(config), context)
    state = load_checkpoint(engine.deepspeed, checkpoint) if checkpoint else TrainingState()
    engine.restore_schedule(state.step)
    measured = []
    for step in range(state.step, steps):
        batches = micro_batches(config, context.dp_rank, context.world_size, step)
        loss = engine.forward_backward(batches, config.training.global_batch_size * config.training.seq_length)
        measured.append((loss, engine.update()[0]))
        if step + 1 == save_at:
            save_checkpoint(engine.deepspeed, config, TrainingState(step + 1))
    groups = [
        {name: group[name] for name in ("betas", "eps", "weight_decay")} for group in engine.optimizer.param_groups
    ]
    settings = groups, getattr(engine.optimizer, "clip_grad", None)
    engine.deepspeed.destroy()
    context.heartbeat.close()
    fresh_world()
    return measured, settings


def resume_rows(folder: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, row in ROWS.items():
        config = row_config(f"{folder}/{name}", **row)
        whole, _ = train(config, save_at=2)
        checkpoint = Path(folder, name, "step_00000002")
        resumed, _ = train(config, checkpoint)
        changed = row_config(f"{folder}/{name}", **row, optimizer=OTHER)
        found[name] = {
            "whole": whole,
            "resumed": resumed,
            "changed": train(changed, checkpoint, steps=0)[1],
        }
    return found


def load_alone(folder: str) -> dict[str, str]:
    """What a world of one rank says to the checkpoints of two."""
    messages = {}
    for name in ("dp2-zero1", "dp2-zero1-bf16"):
        with pytest.raises(CheckpointError) as caught:
            train(row_config(f"{folder}/{name}", **ROWS[name]), Path(folder, name, "step_00000002"))
        messages[name] = str(caught.value)
        parallel_state.destroy_model_parallel()
        fresh_world()
    return messages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def rows(folder: str) -> dict[str, dict[str, Any]]:
    return run_distributed(resume_rows, 2, folder)[0]


@pytest.mark.parametrize("name", ROWS)
def test_a_resumed_run_repeats_the_losses_and_norms_of_the_whole_one(
    name: str, rows: dict[str, dict[str, Any]]
) -> None:
    assert len(rows[name]["resumed"]) == 2
    assert rows[name]["resumed"] == rows[name]["whole"][2:]


@pytest.mark.parametrize("name", ROWS)
def test_changed_optimizer_settings_are_those_of_the_resumed_run(name: str, rows: dict[str, dict[str, Any]]) -> None:
    groups, clip = rows[name]["changed"]
    assert all((group["betas"], group["eps"]) == ((0.5, 0.7), 1e-3) for group in groups)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert clip == 0.25


def test_another_data_parallel_size_is_refused_with_a_remedy(rows: dict[str, Any], folder: str) -> None:
    (messages,) = run_distributed(load_alone, 1, folder)
    for message in messages.values():
        assert "cannot be loaded" in message
        assert message.endswith("use the number of ranks that it was written with, or remove it to start again")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "alignment": ({"stage": 1, "parameter_alignment": True}, "parameter_alignment False, but .* says True"),
    "sub-groups": ({"stage": 3, "sub_group_size": 600}, "sub_group_size 1000000000, but .* says 600"),
    "sequence parallelism": (
        {"stage": 1, "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": False}},
        "parallel.sequence_parallel True, but .* says False",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_orders_deepspeeds_buffers_must_stay(name: str, tmp_path: Path) -> None:
    changed, message = REFUSED[name]
    parallel = {"tensor_model_parallel_size": 2} if "parallel" in changed else None
    save_config(row_config(str(tmp_path), changed["stage"], parallel=parallel), tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=f"{message}: use the saved value"):
        check_resumable(row_config(str(tmp_path), **changed), tmp_path)


def test_keys_that_order_nothing_in_the_stage_may_change(tmp_path: Path) -> None:
    save_config(row_config(str(tmp_path), 1), tmp_path / "config.yaml")
    changed = row_config(str(tmp_path), 1, reduce_bucket_size=1000, optimizer=OTHER)
    assert check_resumable(changed, tmp_path)["optimizer"]["clip_grad"] == 0.5
