"""State that several ranks save and load again: what a resumed run does, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_crnet.checkpoint.compatibility import check_resumable
from megatron_crnet.checkpoint.directory import MANIFEST, PARTIAL, REPLACED, checkpoints, damage
from megatron_crnet.checkpoint.manager import Checkpointer, newest_complete, tidy
from megatron_crnet.checkpoint.train_state import TrainingState
from megatron_crnet.config.loading import save_resolved
from megatron_crnet.config.schema import CheckpointConfig, Config, RecomputeConfig
from megatron_crnet.distributed.process_groups import initialize_parallel
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.utils.errors import CheckpointError, ConfigError
from tests.distributed.spawn import fresh_world, run_distributed
from tests.helpers import ARCHITECTURES, micro_batches, tiny_config

STEPS = 4
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
TP = {"tensor_model_parallel_size": 2}
ROWS: dict[str, dict[str, Any]] = {
    "dp2-zero0-bf16-dropout": {"stage": 0, "dtype": "bf16", "model": DROPOUT},
    "dp2-zero1-bf16": {"stage": 1, "dtype": "bf16"},
    "dp2-zero2-offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "dp2-zero3-dropout": {"stage": 3, "model": DROPOUT},
    "dp2-zero2-replay-dropout": {"stage": 2, "model": DROPOUT, "recompute": "replay"},
    "pp2-zero1-bf16-inverse": {
        "stage": 1,
        "dtype": "bf16",
        "parallel": {"pipeline_model_parallel_size": 2},
        "model": {"num_layers": 8, "beta_init": 0.7},
        "recompute": "inverse",
    },
    # the first stage has no ratio
    "pp2-uneven-zero1-inverse": {
        "stage": 1,
        "parallel": {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
        "model": {"num_layers": 5, "beta_init": 0.7},
        "recompute": "inverse",
    },
    "tp2-zero1-dropout": {"stage": 1, "parallel": TP, "model": DROPOUT},
    "pp2-zero1": {"stage": 1, "parallel": {"pipeline_model_parallel_size": 2}},
    "pp2-zero1-multipliers": {
        "stage": 1,
        "parallel": {"pipeline_model_parallel_size": 2},
        "lr_multipliers": {"embedding": 3.0, "first_layer": 0.25, "a": 2.0, "b": 0.5, "beta": 4.0},
    },
    "pp2-zero1-gpt2": {
        "stage": 1,
        "parallel": {"pipeline_model_parallel_size": 2},
        "model": {**ARCHITECTURES["gpt2"], **DROPOUT},
    },
    "dp2-zero3-bf16-qwen3": {"stage": 3, "dtype": "bf16", "model": ARCHITECTURES["qwen3"]},
    "tp2-ep2-zero2-bf16-qwen3-moe": {
        "stage": 2,
        "dtype": "bf16",
        "parallel": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
        "model": {**ARCHITECTURES["qwen3_moe"], **DROPOUT},
    },
    "dp2-ep2-zero1-bf16-qwen3-moe": {
        "stage": 1,
        "dtype": "bf16",
        "parallel": {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"},
        "model": {**ARCHITECTURES["qwen3_moe"], **DROPOUT},
        "recompute": "replay",
    },
    "dp2-ep2-zero1-bf16-relora-moe": {
        "stage": 1,
        "dtype": "bf16",
        "parallel": {"expert_model_parallel_size": 2},
        "model": {**ARCHITECTURES["qwen3_moe"], **DROPOUT, "variant": "relora"},
    },
    "dp2-zero3-bf16-multipliers": {"stage": 3, "dtype": "bf16", "lr_multipliers": {"first_layer": 0.25, "b": 0.5}},
}
OTHER = {"adam_beta1": 0.5, "adam_beta2": 0.7, "adam_eps": 1e-3, "weight_decay": 0.3, "clip_grad": 0.25}


def row_config(
    folder: str | Path,
    stage: int = 0,
    dtype: str = "fp32",
    parallel: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    recompute: Literal["none", "replay", "inverse"] = "none",
    lr_multipliers: dict[str, float] | None = None,
    sequences: int = 4,
    **zero: Any,
) -> Config:
    section = {"zero_optimization": {"stage": stage, **zero}}
    training = {"dtype": dtype, "train_steps": STEPS, "global_batch_size": sequences}
    optimizer = {"lr_multipliers": lr_multipliers or {}, **(optimizer or {})}
    config = tiny_config(model, parallel, training, optimizer, section)
    return dataclasses.replace(
        config,
        checkpoint=CheckpointConfig(dir=str(folder), keep_last=2, keep_every=10),
        recompute=RecomputeConfig(strategy=recompute),
    )


def settings_of(engine: TrainEngine) -> Any:
    """What the optimizer goes by."""
    groups = [
        {name: group[name] for name in ("betas", "eps", "weight_decay")} for group in engine.optimizer.param_groups
    ]
    return groups, getattr(engine.optimizer, "clip_grad", None)


def train(
    config: Config,
    checkpoint: Path | None = None,
    save_at: int = 0,
    steps: int = STEPS,
    read: Callable[[TrainEngine], Any] = settings_of,
) -> tuple[list[tuple[float, float]], Any]:
    """Losses and gradient norms from the checkpoint, or from scratch, to the last step; what `read` gives after it."""
    context = initialize_parallel(config)
    engine = TrainEngine(config, build_model_chunks(config), context)
    checkpointer = Checkpointer(config, engine)
    state = checkpointer.load(checkpoint) if checkpoint else TrainingState()
    engine.restore_schedule(state.step)
    measured = []
    for step in range(state.step, steps):
        batches = micro_batches(config, context.dp_rank, context.world_size, step)
        loss = engine.forward_backward(batches, config.training.global_batch_size * config.training.seq_length)
        measured.append((loss, engine.update()[0]))
        if step + 1 == save_at:
            checkpointer.save(TrainingState(step + 1))
    checkpointer.wait()
    found = read(engine)
    engine.close()
    context.heartbeat.close()
    fresh_world()
    return measured, found


RARE = (
    "dp2-zero2-offload",
    "dp2-zero3-dropout",
    "pp2-zero1-multipliers",
    "dp2-zero3-bf16-qwen3",
    "tp2-ep2-zero2-bf16-qwen3-moe",
    "dp2-ep2-zero1-bf16-relora-moe",
    "dp2-zero3-bf16-multipliers",
)
"""Run with the long matrices."""
SOON = tuple(name for name in ROWS if name not in RARE)


def resume_rows(folder: str, names: tuple[str, ...] = SOON) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, row in ((name, ROWS[name]) for name in names):
        config = row_config(f"{folder}/{name}", **row)
        whole, _ = train(config, save_at=2)
        checkpoint = Path(folder, name, "step_00000002")
        changed = row_config(f"{folder}/{name}", **row, optimizer=OTHER)
        found[name] = {
            "whole": whole,
            "resumed": train(config, checkpoint)[0],
            "changed": train(changed, checkpoint, steps=0)[1],
        }
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def rows(folder: str) -> dict[str, dict[str, Any]]:
    return run_distributed(resume_rows, 2, folder)[0]


def check_resumed(row: dict[str, Any]) -> None:
    assert len(row["resumed"]) == 2
    assert row["resumed"] == row["whole"][2:]


def check_changed(row: dict[str, Any]) -> None:
    groups, clip = row["changed"]
    assert all((group["betas"], group["eps"]) == ((0.5, 0.7), 1e-3) for group in groups)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert clip == 0.25


@pytest.mark.parametrize("name", SOON)
def test_a_resumed_run_repeats_the_losses_and_norms_of_the_whole_one(
    name: str, rows: dict[str, dict[str, Any]]
) -> None:
    check_resumed(rows[name])


@pytest.mark.parametrize("name", SOON)
def test_changed_optimizer_settings_are_those_of_the_resumed_run(name: str, rows: dict[str, dict[str, Any]]) -> None:
    check_changed(rows[name])


@pytest.mark.long
def test_rarer_rows_resume_as_well(tmp_path: Path) -> None:
    for row in run_distributed(resume_rows, 2, str(tmp_path), RARE)[0].values():
        check_resumed(row)
        check_changed(row)


def test_a_checkpoint_says_what_it_holds_and_pickles_nothing(rows: dict[str, Any], folder: str) -> None:
    checkpoint = Path(folder, "tp2-zero1-dropout", "step_00000002")
    assert damage(checkpoint) is None
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert {*files, MANIFEST} == {path.name for path in checkpoint.iterdir()}
    assert {Path(name).suffix for name in files} == {".safetensors", ".json", ".yaml"}
    (checkpoint.parent / "file").touch()
    assert {path.stat().st_mode for path in checkpoint.iterdir()} == {(checkpoint.parent / "file").stat().st_mode}
    about = json.loads((checkpoint / "state.json").read_text())
    assert (about["step"], about["adam_steps"]) == (2, 2)
    assert about["layout"]["tensor_model_parallel_size"] == 2
    assert set(about["versions"]) >= {"torch", "deepspeed", "megatron-core"}


def keep_and_fail(folder: str) -> tuple[list[str], list[str], list[str], str]:
    """Checkpoints that are left by the policy; then after a save that fails and one after that; then after a stop."""
    config = row_config(folder)
    context = initialize_parallel(config)
    engine = TrainEngine(config, build_model_chunks(config), context)
    checkpointer = Checkpointer(config, engine)
    for step in (10, 11, 12, 13):
        checkpointer.save(TrainingState(step))
    checkpointer.wait()
    kept = [path.name for path in checkpoints(Path(folder))]
    moved = Path(folder).rename(f"{folder}-moved")
    Path(folder).write_text("in the way")
    checkpointer.save(TrainingState(14))
    with pytest.raises(CheckpointError) as caught:
        checkpointer.wait()
    Path(folder).unlink()
    moved.rename(folder)
    checkpointer.save(TrainingState(15))
    checkpointer.wait()
    after = [path.name for path in checkpoints(Path(folder))]
    for step in (14, 1):  # the second time nothing is older, and nothing is set aside
        found = checkpointer.step_back(step)
        assert found == Path(folder, "step_00000013")
        checkpointer.save(TrainingState(16), aside=True)
        checkpointer.wait()
    back = sorted(path.name for path in Path(folder).iterdir())
    context.heartbeat.close()
    fresh_world()
    return kept, after, back, str(caught.value)


@pytest.mark.fault("B1")
def test_the_policy_keeps_the_last_and_every_tenth_and_a_failed_save_harms_nothing(tmp_path: Path) -> None:
    (found,) = run_distributed(keep_and_fail, 1, str(tmp_path / "kept"))
    kept, after, back, message = found
    assert kept == ["step_00000010", "step_00000012", "step_00000013"]
    assert after == ["step_00000010", "step_00000013", "step_00000015"]
    aside = "rejected_step_00000016.from_step_00000017"
    names = ["latest", "rejected_step_00000015", aside, f"{aside}.2", "step_00000010", "step_00000013"]
    assert back == names
    assert (tmp_path / "kept" / "latest").read_text() == "step_00000013\n"
    assert "cannot write a checkpoint into" in message
    assert message.endswith("earlier checkpoints are untouched")


def choose(folder: str) -> tuple[str, list[str]]:
    initialize_parallel(tiny_config()).heartbeat.close()
    tidy(Path(folder))
    found, damaged = newest_complete(checkpoints(Path(folder)))
    fresh_world()
    return found.name if found else "none", damaged


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    rows: dict[str, Any], folder: str, tmp_path: Path
) -> None:
    whole = tmp_path / "checkpoints"
    for step in (2, 3, 4, 5, 6):
        shutil.copytree(Path(folder, "dp2-zero1-bf16", "step_00000002"), whole / f"step_{step:08d}")
    data = "shard-00001-model-00001-of-00001.safetensors"
    with (whole / "step_00000003" / data).open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"other")
    with (whole / "step_00000004" / data).open("ab") as file:
        file.write(b"more")
    (whole / "step_00000005" / data).unlink()
    (whole / "step_00000006" / MANIFEST).unlink()
    (whole / f"{PARTIAL}step_00000007").mkdir()
    (whole / "step_00000002").rename(whole / f"{REPLACED}step_00000002")
    results = run_distributed(choose, 2, str(whole))
    assert results[0] == results[1]
    name, damaged = results[0]
    assert name == "step_00000002"
    for line, problem in zip(
        damaged, ("has no manifest", "lacks shard", "bytes in shard", "another checksum"), strict=True
    ):
        assert problem in line
    assert [path.name for path in whole.glob(".*")] == [f"{PARTIAL}step_00000007"]  # the next save removes it


def test_another_model_is_refused_with_the_difference(tmp_path: Path) -> None:
    save_resolved(row_config(tmp_path), tmp_path / "config.yaml")
    other = row_config(tmp_path, model={"num_layers": 6, "beta_init": 0.5, "rank": 3})
    with pytest.raises(ConfigError, match=r"model.num_layers 4 instead of 6, .*rank .* instead of 3: use the saved"):
        check_resumable(other, tmp_path)


def test_a_full_rank_checkpoint_is_converted_by_a_command_that_is_named(tmp_path: Path) -> None:
    save_resolved(row_config(tmp_path, model={"variant": "full_rank"}), tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"model.variant full_rank instead of relora.* by crnet init --model.variant"):
        check_resumable(row_config(tmp_path, model={"variant": "relora"}), tmp_path)


def test_layout_stage_precision_and_optimizer_may_change(tmp_path: Path) -> None:
    save_resolved(row_config(tmp_path), tmp_path / "config.yaml")
    changed = row_config(tmp_path, 1, "bf16", TP, OTHER, reduce_bucket_size=1000)
    assert check_resumable(changed, tmp_path)["optimizer"]["clip_grad"] == 0.5
