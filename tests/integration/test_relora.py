"""A whole run of ReLoRA, warm start and restarts: resumed around each of them to the bit, and exported merged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_crnet.analysis.source import open_source
from megatron_crnet.config.loading import load_config
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.hf.export import to_hf
from megatron_crnet.training.callbacks.base import Callback, Step
from megatron_crnet.training.trainer import Trainer, run_training
from megatron_crnet.utils.errors import BadStepError
from tests.integration.conftest import Corpus, check_continued, checkpoint, lines_of, saved, start_here

WARM, INTERVAL, STEPS = 2, 3, 8
RUN: dict[str, Any] = {
    "model__variant": "relora",
    "training__train_steps": STEPS,
    "training__eval_steps": 0,
    "training__dtype": "bf16",
    "deepspeed__zero_optimization__stage": 1,
    "optimizer__lr_decay_style": "cosine_restarts",
    "optimizer__lr_restart_warmup_steps": 2,
    "relora__restart_interval": INTERVAL,
    "relora__warm_start_steps": WARM,
    "checkpoint__save_interval": 1,
}
FACTOR, OF_EXPERT = "model.layers.2.mlp.up_proj", "model.layers.2.mlp.experts.3.up_proj"
EXPERTS = {"model__architecture": "qwen3_moe", "model__num_experts": 4, "model__moe_router_topk": 2}


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("relora") / "run"
    outcome = start_here(corpus.options(output, **RUN))
    assert outcome.status == 0, outcome.stderr
    return output


def test_the_first_engine_is_gone_before_the_second_takes_memory(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, built, alive = Trainer._build_engine, list[StorageWeakRef](), list[bool]()

    def watched(trainer: Trainer) -> TrainEngine:
        alive.extend(not storage.expired() for storage in built)
        engine = build(trainer)
        tensors = [*engine.zero.weights(), *engine.zero.state()]
        built.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)
        return engine

    monkeypatch.setattr(Trainer, "_build_engine", watched)
    changes = {**RUN, "training__train_steps": WARM + 2, "optimizer__lr_decay_style": "cosine"}
    changes |= {"relora__restart_interval": "null", "checkpoint__save_interval": 0}
    assert start_here(corpus.options(tmp_path / "run", **changes)).status == 0
    assert alive
    assert not any(alive)


def test_a_run_that_is_extended_makes_up_for_the_restart_at_its_former_end(
    corpus: Corpus, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    assert lines_of(whole, "restarts")[STEPS] == 1
    changes = {**RUN, "training__train_steps": STEPS + INTERVAL, "checkpoint__dir": tmp_path / "run" / "checkpoints"}
    outcome = start_here(corpus.options(tmp_path / "run", **changes))
    assert outcome.status == 0, outcome.stderr
    assert lines_of(tmp_path / "run", "restarts")[STEPS + INTERVAL] == 2


def test_the_rate_starts_anew_after_the_warm_start_and_drops_at_restarts(whole: Path) -> None:
    lr, peak = lines_of(whole, "lr"), 1e-3
    assert lr[1] == pytest.approx(peak / 2)
    assert lr[2] < lr[1]
    assert lr[WARM + 1] == pytest.approx(peak)
    assert lr[WARM + INTERVAL + 1] == pytest.approx(lr[WARM + INTERVAL + 2] / 2)
    assert lines_of(whole, "restarts") == {s: int(s >= WARM + INTERVAL) for s in range(1, STEPS + 1)}


def test_the_warm_start_is_a_full_rank_run(whole: Path, corpus: Corpus, tmp_path: Path) -> None:
    changes = {k: v for k, v in RUN.items() if not k.startswith(("relora", "model", "optimizer"))}
    dense = {"model__variant": "full_rank", "optimizer__lr": 5e-4}
    assert start_here(corpus.options(tmp_path / "dense", **changes, **dense)).status == 0
    assert [lines_of(tmp_path / "dense", "loss")[s] for s in (1, 2)] == [lines_of(whole, "loss")[s] for s in (1, 2)]


def test_weights_are_frozen_from_the_warm_start_and_change_at_restarts_alone(whole: Path) -> None:
    states = {step: saved(whole, step) for step in range(1, STEPS + 1)}
    weights = {step: state[f"master.{FACTOR}.weight"] for step, state in states.items()}
    same = {step: torch.equal(weights[step], weights[step - 1]) for step in range(2, STEPS + 1)}
    assert same == {step: step > WARM and step != WARM + INTERVAL for step in same}
    at = states[WARM + INTERVAL]
    assert not at[f"master.{FACTOR}.b.weight"].any()
    assert not torch.equal(at[f"master.{FACTOR}.a.weight"], states[WARM + INTERVAL - 1][f"master.{FACTOR}.a.weight"])
    assert f"exp_avg.{FACTOR}.weight" in states[1]
    assert f"exp_avg.{FACTOR}.weight" not in at


@pytest.mark.parametrize(
    "step",
    [
        WARM - 1,
        pytest.param(WARM, marks=pytest.mark.long),
        pytest.param(WARM + INTERVAL - 1, marks=pytest.mark.long),
        WARM + INTERVAL,
    ],
)
def test_a_run_killed_around_a_change_continues_to_the_bit(
    step: int, whole: Path, corpus: Corpus, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    check_continued(whole, cut, step, corpus.options(cut, **RUN))


@pytest.mark.long
def test_a_run_with_experts_continues_to_the_bit_and_is_merged_as_well(corpus: Corpus, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", {**RUN, **EXPERTS}
    assert start_here(corpus.options(whole, **run)).status == 0
    for step in (WARM - 1, WARM, WARM + INTERVAL - 1, WARM + INTERVAL):
        cut = tmp_path / f"cut_{step}"
        check_continued(whole, cut, step, corpus.options(cut, **run))
    check_merged(whole, STEPS, OF_EXPERT, tmp_path)


@pytest.mark.parametrize("step", [WARM - 1, WARM + INTERVAL, STEPS])
def test_an_export_is_full_rank_and_merged(step: int, whole: Path, tmp_path: Path) -> None:
    check_merged(whole, step, FACTOR, tmp_path)


def check_merged(whole: Path, step: int, factor: str, folder: Path) -> None:
    to_hf(checkpoint(whole, step), folder / "export")
    exported, state = load_file(folder / "export" / "model.safetensors"), saved(whole, step)
    wanted = state[f"master.{factor}.weight"]
    if step > WARM:
        wanted = wanted + 0.25 * state[f"master.{factor}.b.weight"] @ state[f"master.{factor}.a.weight"]
    assert torch.equal(exported[f"{factor}.weight"], wanted)
    assert not [name for name in exported if name.endswith((".a.weight", ".b.weight"))]
    assert open_source(checkpoint(whole, step)).step == step


class SpoilGradients(Callback):
    """Makes the gradients of the step after `step` NaN, whose loss is finite."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        if trainer.state.step == self.step:
            for parameter in trainer.engine.deepspeed.module.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda grad: grad * float("nan"))


def test_a_bad_step_at_a_restart_leaves_the_state_before_both(whole: Path, corpus: Corpus, tmp_path: Path) -> None:
    output, last = tmp_path / "run", WARM + INTERVAL - 1
    with pytest.raises(BadStepError, match="the state just before this step is kept beside it"):
        run_training(load_config({}, corpus.options(output, **RUN)), callbacks=[SpoilGradients(last)])
    (aside,) = (output / "checkpoints").glob("rejected_*.from_*")
    kept = {name: value for file in aside.glob("*.safetensors") for name, value in load_file(file).items()}
    wanted = saved(whole, last)
    assert kept.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in kept.items())


def test_a_checkpoint_after_restarts_starts_a_run_that_draws_other_factors(
    whole: Path, corpus: Corpus, tmp_path: Path
) -> None:
    changes = {**RUN, "relora__warm_start_steps": 0, "training__train_steps": 6}
    outcome = start_here(corpus.options(tmp_path / "new", **changes, checkpoint__load=checkpoint(whole, STEPS)))
    assert outcome.status == 0, outcome.stderr
    assert lines_of(tmp_path / "new", "restarts") == {1: 1, 2: 1, 3: 2, 4: 2, 5: 2, 6: 2}
    outcome = start_here(corpus.options(tmp_path / "warm", **RUN, checkpoint__load=checkpoint(whole, STEPS)))
    assert outcome.status == 2
    assert "full-rank weights of a warm start there: use relora.warm_start_steps 0, or" in outcome.stderr


def test_another_warm_start_is_refused_after_its_end(whole: Path, corpus: Corpus, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(checkpoint(whole, WARM + 2), checkpoint(cut, WARM + 2))
    changes = {**RUN, "relora__warm_start_steps": WARM + 1, "training__train_steps": STEPS + 1}
    outcome = start_here(corpus.options(cut, **changes))
    assert outcome.status == 2
    assert "is of a run whose warm start had 2 steps, but relora.warm_start_steps is 3" in outcome.stderr
