"""Starting from another run's weights, and measuring without training."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_crnet.config.loading import read_config
from megatron_crnet.data.train_tokenizer import train_sentencepiece
from megatron_crnet.hf.export import from_hf, to_hf
from megatron_crnet.training.preflight import _examine
from megatron_crnet.training.starting_point import _examine_path
from megatron_crnet.utils.folder_lock import LOCK, this_process
from tests.integration.conftest import Corpus, lines_of, start, start_here
from tests.unit.data_helpers import library_texts

QUIET: dict[str, Any] = {"training__eval_steps": 0}
POSITIONS = "model__max_position_embeddings"
STILL = {"optimizer__lr": 1e-30, "optimizer__weight_decay": 0}


@pytest.fixture(scope="module")
def other(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of 6 steps, from another seed."""
    output = tmp_path_factory.mktemp("other") / "run"
    outcome = start_here(corpus.options(output, training__seed=5))
    assert outcome.status == 0, outcome.stderr
    return output


def tensors(output: Path, step: int) -> dict[str, Any]:
    (file,) = (output / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")
    return {name: value for name, value in load_file(file).items() if not name.startswith("random")}


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_00000006"])
def test_a_new_run_starts_at_step_0_from_the_weights_of_another(
    other: Path, corpus: Corpus, tmp_path: Path, place: str
) -> None:
    output = tmp_path / "run"
    options = {**QUIET, **STILL, "checkpoint__load": other / place, "training__train_steps": 2}
    outcome = start_here(corpus.options(output, **options))
    assert outcome.status == 0, outcome.stderr
    assert f"starting from the weights of {other}/checkpoints/step_00000006 (its step 6), at step 0" in outcome.stdout
    assert set(lines_of(output, "loss")) == {1, 2}
    before, after = tensors(other, 6), tensors(output, 2)
    for name, value in before.items():
        if name.startswith("master."):
            assert value.equal(after[name]), "a rate of almost 0 changes no weight"
    loaded = {"checkpoint": f"{other}/checkpoints/step_00000006", "step": 6, "optimizer_state": False}
    state = json.loads((output / "checkpoints" / "step_00000002" / "state.json").read_text())
    assert (state["loaded_from"], state["adam_steps"], state["samples"]) == (loaded, 2, 8)
    assert json.loads((output / "run.json").read_text())["loaded_from"] == loaded


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_optimizer_state_comes_along_where_it_is_asked_for(
    other: Path, corpus: Corpus, tmp_path: Path, stage: int
) -> None:
    """Under any ZeRO stage: Adam counts on, and moments decay from those of the other run."""
    options = {**QUIET, "checkpoint__load": other, "training__train_steps": 1, "training__seed": 5}
    options["optimizer__lr_warmup_steps"] = 0
    options["deepspeed__zero_optimization__stage"] = stage
    losses = []
    for optimizer in ("true", "false"):
        output = tmp_path / optimizer
        outcome = start_here(corpus.options(output, **options, checkpoint__load_optimizer=optimizer))
        assert outcome.status == 0, outcome.stderr
        losses.append(lines_of(output, "loss")[1])
        state = json.loads((output / "checkpoints" / "step_00000001" / "state.json").read_text())
        assert state["adam_steps"] == (7 if optimizer == "true" else 1)
    assert losses[0] == losses[1]
    name = "exp_avg_sq.model.embed_tokens.weight"
    old, with_state, without = (tensors(run, step)[name] for run, step in
                                ((other, 6), (tmp_path / "true", 1), (tmp_path / "false", 1)))  # fmt: skip
    assert (with_state - without).sub(old * 0.95).abs().max() < 1e-6 * old.max()


def test_a_checkpoint_of_the_run_itself_comes_first(other: Path, corpus: Corpus, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = {**QUIET, "checkpoint__load": other}
    assert start_here(corpus.options(output, **options, training__train_steps=2)).status == 0
    outcome = start_here(corpus.options(output, **options, training__train_steps=3))
    assert outcome.status == 0, outcome.stderr
    assert f"note: checkpoint.load {other} is not read: the run goes on from its own checkpoint" in outcome.stdout
    assert f"continuing from {output}/checkpoints/step_00000002" in outcome.stdout
    assert json.loads((output / "run.json").read_text())["loaded_from"]["step"] == 6, "it is still known"


def test_what_does_not_fit_is_one_line_and_nothing_is_written(other: Path, corpus: Corpus, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(other / "checkpoints" / "step_00000006", damaged / "step_00000006")
    (damaged / "step_00000006" / "config.yaml").write_text("{}")
    renamed = shutil.copytree(other / "checkpoints" / "step_00000006", tmp_path / "step_00000005")
    learned, gpt2 = tmp_path / "learned", {"model__architecture": "gpt2"}
    assert start_here(corpus.options(learned, **QUIET, **gpt2, **{POSITIONS: 32}, training__train_steps=2)).status == 0
    rows: list[tuple[dict[str, Any], str]] = [
        ({"checkpoint__load": other, "model__rank": 4}, "was written with model.rank 8 instead of 4: use the saved"),
        ({"checkpoint__load": learned, **gpt2, POSITIONS: 64}, "with model.max_position_embeddings 32 instead of 64"),
        ({"checkpoint__load": tmp_path / "absent"}, "absent holds no checkpoint: give a step_ folder"),
        ({"checkpoint__load": corpus.train.parent}, "holds no checkpoint: give a step_ folder"),
        ({"checkpoint__load": damaged}, "holds no whole checkpoint (checkpoint "),
        ({"checkpoint__load": damaged / "step_00000006"}, "holds no whole checkpoint (checkpoint "),
        ({"checkpoint__load": renamed}, "step_00000005 has step 6 in its state.json and another in its name: skipped"),
        ({"checkpoint__load_optimizer": "true"}, "checkpoint.load_optimizer is true, but checkpoint.load is not set"),
        ({"training__eval_only": "true"}, "training.eval_only needs a checkpoint, but "),
        (
            {"training__eval_only": "true", "checkpoint__load": other, "training__eval_steps": 0},
            "training.eval_only has nothing to measure",
        ),
    ]
    for changes, message in rows:
        outcome = start_here(corpus.options(tmp_path / "run", **changes))
        assert (outcome.status, outcome.stderr.count("\n")) == (2, 1), outcome.stderr
        assert message in outcome.stderr
    assert not (tmp_path / "run").exists()


def test_weights_of_another_tokenizer_are_a_warning(other: Path, corpus: Corpus, tmp_path: Path) -> None:
    tokenizer = train_sentencepiece(library_texts(20), tmp_path / "tokenizer", 512)
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus.train}{suffix}", tmp_path / f"train{suffix}")
    options = {**QUIET, "checkpoint__load": other, "data__tokenizer_model": tokenizer, "training__train_steps": 2}
    options["data__train_data_path"] = f"[{tmp_path / 'train'}]"
    outcome = start_here(corpus.options(tmp_path / "run", **options))
    assert outcome.status == 0, outcome.stderr
    assert "warning: the weights of " in outcome.stdout
    assert "their embeddings are those of other tokens" in outcome.stdout


def test_an_import_knows_the_tokenizer_of_its_export(other: Path, corpus: Corpus, tmp_path: Path) -> None:
    to_hf(other / "checkpoints" / "step_00000006", tmp_path / "export")
    from_hf(tmp_path / "export", tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    tokenizer = train_sentencepiece(library_texts(20), tmp_path / "tokenizer", 512)
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus.train}{suffix}", tmp_path / f"train{suffix}")
    options = {**QUIET, "data__tokenizer_model": tokenizer, "training__train_steps": 1}
    options.update(optimizer__lr_warmup_steps=0, data__train_data_path=f"[{tmp_path / 'train'}]")
    outcome = start_here(corpus.options(tmp_path / "run", **options))
    assert (outcome.status, outcome.stderr.count("\n")) == (2, 1), outcome.stderr
    assert "step_00000000 was trained with the tokenizer " in outcome.stderr
    outcome = start_here(corpus.options(tmp_path / "new", **options, checkpoint__load=tmp_path / "run"))
    assert outcome.status == 0, outcome.stderr
    assert "their embeddings are those of other tokens" in outcome.stdout
    del options["data__tokenizer_model"]
    outcome = start_here(corpus.options(tmp_path / "same", **options))
    assert outcome.status == 0, outcome.stderr
    assert not any("warning: the weights" in line for line in outcome.stdout.splitlines()), "the same model file"


def files(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*") if path.is_file()}


def test_a_run_can_be_measured_without_a_step(other: Path, corpus: Corpus, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(other, output)
    before = files(output)
    options = {"training__eval_only": "true", "data__train_data_path": "[]", "training__seed": 5}
    outcome = start_here(corpus.options(output, **options, data__test_data_path=f"[{corpus.train}]"))
    assert outcome.status == 0, outcome.stderr
    assert f"evaluating {output}/checkpoints/step_00000006, step 6" in outcome.stdout
    (line,) = [json.loads(line) for line in (output / "evaluations.jsonl").read_text().splitlines()]
    assert line["validation_loss"] == lines_of(other, "validation_loss")[6]
    assert (line["step"], line["test_loss"] > 0) == (6, True)
    (output / "evaluations.jsonl").unlink()
    assert files(output) == before


def test_a_run_is_measured_beside_its_own_training(other: Path, corpus: Corpus, tmp_path: Path) -> None:
    """Another process holds both folders, and ranks look into them while it saves and prunes."""
    output = tmp_path / "run"
    shutil.copytree(other, output)
    for folder in (output, output / "checkpoints"):
        (folder / LOCK).write_text(json.dumps(asdict(this_process())))
    (output / "checkpoints" / ".partial_step_00000007.0").mkdir()
    before = files(tmp_path)
    training, measuring = corpus.options(output), corpus.options(output, training__eval_only="true")
    refused = start_here(training)
    assert (refused.status, "is in use by process" in refused.stderr) == (2, True), refused.stderr
    outcome = start_here(measuring)
    assert outcome.status == 0, outcome.stderr
    assert "continuing" not in outcome.stdout
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    (output / "evaluations.jsonl").unlink()
    assert files(tmp_path) == before
    assert (output / "checkpoints" / ".partial_step_00000007.0").is_dir()

    def what_ranks_compare() -> list[dict[str, str]]:
        return [
            *(_examine(read_config(options))[1] for options in (training, measuring)),
            _examine_path(output)[1],
        ]

    first = what_ranks_compare()
    (output / "checkpoints" / "step_00000007").mkdir()
    second = what_ranks_compare()
    assert [a == b for a, b in zip(first, second, strict=True)] == [False, True, True]


def test_a_loaded_checkpoint_can_be_measured(other: Path, corpus: Corpus, tmp_path: Path) -> None:
    options = {
        "training__eval_only": "true",
        "checkpoint__load": other,
        "training__seed": 5,
        "deepspeed__zero_optimization__stage": 3,
    }
    outcome = start_here(corpus.options(tmp_path / "run", **options))
    assert outcome.status == 0, outcome.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["evaluations.jsonl"]
    line = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text())
    assert line["checkpoint"] == f"{other}/checkpoints/step_00000006"
    assert line["validation_loss"] == pytest.approx(lines_of(other, "validation_loss")[6], rel=1e-6)


def test_what_no_weight_depends_on_may_differ(other: Path, corpus: Corpus, tmp_path: Path) -> None:
    """Of a full-rank model the rank, of others its spelling; and for a measurement the optimizer's form."""
    measured = {"training__eval_only": "true", "checkpoint__load": other}
    spelt = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), [8] * 4)
    outcome = start_here(corpus.options(tmp_path / "spelt", **measured, model__rank=json.dumps(spelt)))
    assert outcome.status == 0, outcome.stderr
    dense = {"model__variant": "full_rank"}
    galore = {"optimizer__name": "galore", "optimizer__galore_rank": 4, "training__train_steps": 2}
    assert start_here(corpus.options(tmp_path / "dense", **dense, **galore)).status == 0
    of_none = {**dense, "model__rank": 4, "training__eval_only": "true"}
    outcome = start_here(corpus.options(tmp_path / "dense", **of_none))
    assert outcome.status == 0, outcome.stderr


def test_another_layout_measures_the_same_loss(other: Path, corpus: Corpus, tmp_path: Path) -> None:
    options = {"training__eval_only": "true", "checkpoint__load": other, "training__seed": 5}
    result = start(
        corpus.options(tmp_path / "run", parallel__tensor_model_parallel_size=2, **options),
        ranks=2,
    )
    assert result.returncode == 0, result.stderr
    (line,) = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line)["validation_loss"] == pytest.approx(lines_of(other, "validation_loss")[6], rel=1e-5)
