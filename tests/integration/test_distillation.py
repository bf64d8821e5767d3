"""From a dense run over `crnet init` to a run that its dense model teaches, as a user does it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_crnet import to_hf
from megatron_crnet.checkpoint.weight_files import CheckpointWeights
from megatron_crnet.cli.main import main
from tests.integration.conftest import Corpus, lines_of, start, start_here

LENGTHS = {"training__train_steps": 4, "training__eval_interval": 0, "training__eval_steps": 0}


@dataclass(frozen=True)
class Dense:
    """A dense model's export, and the model section and checkpoint of the low-rank model that was made of it."""

    export: Path
    start: Path


@pytest.fixture(scope="module")
def dense(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Dense:
    folder = tmp_path_factory.mktemp("dense")
    run = start_here(corpus.options(folder / "run", model__variant="full_rank", **LENGTHS))
    assert run.status == 0, run.stderr
    export = to_hf(folder / "run", folder / "export")
    options = [str(export), str(folder / "start"), "--model.variant=low_rank", "--model.rank=8"]
    start(options, program="tools/init_from_dense.py").check_returncode()
    return Dense(export, folder / "start")


def options(corpus: Corpus, dense: Dense, output: Path, **changes: object) -> list[str]:
    taught = {"model__variant": "low_rank", "checkpoint__load": dense.start, "distillation__teacher": dense.export}
    return corpus.options(output, **{**LENGTHS, **taught, **changes})


def test_both_losses_are_logged_and_a_resumed_run_repeats_them(corpus: Corpus, dense: Dense, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # the checkpoint lies between two metric lines
    changes = {"distillation__kd_beta": 0.1, "logging__log_interval": 3, "checkpoint__save_interval": 2}
    first = start_here(options(corpus, dense, whole, **changes))
    assert first.status == 0, first.stderr
    assert f"the teacher is {dense.export}" in first.stdout
    assert " | feature loss " in first.stdout
    assert lines_of(whole, "feature_loss").keys() == lines_of(whole, "loss").keys() == {1, 3, 4}
    (cut / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "step_00000002", cut / "checkpoints" / "step_00000002")
    second = start_here(options(corpus, dense, cut, **changes))
    assert second.status == 0, second.stderr
    for name in ("loss", "feature_loss", "logit_loss", "grad_norm"):
        values = lines_of(whole, name)
        assert lines_of(cut, name) == {step: values[step] for step in (3, 4)}
        assert all(0 < value < 100 for value in values.values())
    of_whole, of_cut = (CheckpointWeights(run / "checkpoints" / "step_00000004") for run in (whole, cut))
    assert of_whole.shapes.keys() == CheckpointWeights(dense.start / "step_00000000").shapes.keys(), "no teacher's"
    weights = of_cut.read(of_cut.shapes)
    assert all(torch.equal(value, weights[name]) for name, value in of_whole.read(of_whole.shapes).items())


def test_a_dense_model_with_experts_is_converted_trained_and_taught(corpus: Corpus, tmp_path: Path) -> None:
    experts = {"model__architecture": "qwen3_moe", "model__num_experts": 4, "model__moe_router_topk": 2}
    changes: dict[str, object] = {**LENGTHS, **experts, "training__train_steps": 2}
    run = start_here(corpus.options(tmp_path / "dense", model__variant="full_rank", **changes))
    assert run.status == 0, run.stderr
    export, begin = to_hf(tmp_path / "dense", tmp_path / "export", plain=True), tmp_path / "start"
    assert main(["init", str(export), str(begin), "--model.rank=8", f"--prefix={corpus.train}", "--tokens=1024"]) == 0
    taught = {"checkpoint__load": begin, "distillation__teacher": export}
    second = start_here(corpus.options(tmp_path / "run", **changes, **taught))
    assert second.status == 0, second.stderr
    assert lines_of(tmp_path / "run", "feature_loss").keys() == lines_of(tmp_path / "run", "loss").keys() == {1, 2}
    before, after = (
        CheckpointWeights(path) for path in (begin / "step_00000000", tmp_path / "run/checkpoints/step_00000002")
    )
    assert before.shapes == after.shapes
    for name in ("mlp.experts.3.up_proj.a.weight", "mlp.gate.weight", "self_attn.o_proj.beta"):
        name = f"model.layers.2.{name}"
        assert not torch.equal(before.read([name])[name], after.read([name])[name])


def other(dense: Dense, folder: Path, **changes: object) -> Path:
    """A copy of the export with other values in its config.json."""
    shutil.copytree(dense.export, folder)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, **changes}))
    return folder


def with_weights(dense: Dense, folder: Path, name: str, value: float | None) -> Path:
    """A copy of the export in which a weight is filled with `value`, or missing."""
    shutil.copytree(dense.export, folder)
    weights = load_file(folder / "model.safetensors")
    if value is None:
        del weights[name]
    else:
        weights[name].fill_(value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NORM = "model.layers.1.input_layernorm.weight"


def test_what_cannot_teach_is_refused_in_one_line(corpus: Corpus, dense: Dense, tmp_path: Path) -> None:
    no_teachers = {
        tmp_path / "nowhere": "config.json is not readable",
        other(dense, tmp_path / "wider", intermediate_size=64): "its ffn_hidden_size is 64, but model.ffn_hidden_size",
        other(dense, tmp_path / "heads", num_key_value_heads=2): "its num_query_groups is 2, but model.num_query_group",
        other(dense, tmp_path / "words", vocab_size=520): "its vocab_size is 520, but model.vocab_size is 512",
        other(dense, tmp_path / "low", variant="low_rank"): "it is of variant low_rank, but a teacher is dense",
        other(dense, tmp_path / "short", max_position_embeddings=16): "its max_position_embeddings 16 is below",
        other(dense, tmp_path / "bert", model_type="bert"): "a model of type 'bert'",
        with_weights(dense, tmp_path / "lacking", NORM, None): f"lacks the weight {NORM}",
        with_weights(dense, tmp_path / "nan", NORM, float("nan")): f"holds values in {NORM} that are not finite",
    }
    for folder, message in no_teachers.items():
        output = tmp_path / "run"
        result = start_here(options(corpus, dense, output, distillation__teacher=folder))
        assert result.status == 2, result.stdout
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
        assert message in line
        assert f"distillation.teacher {folder}" in line
        assert not output.exists()
