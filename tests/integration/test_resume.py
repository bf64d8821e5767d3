"""A resumed run is the same run, or says in one line what is not the same; by the entry point, in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_crnet.checkpoint.directory import MANIFEST, complete, file_entries
from megatron_crnet.data.fingerprint import sidecar
from megatron_crnet.data.train_tokenizer import train_sentencepiece
from tests.integration.conftest import Corpus, lines_of, start_here
from tests.unit.data_helpers import library_texts

QUIET: dict[str, Any] = {"training__eval_steps": 0, "checkpoint__save_interval": 3}


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps without validation, with a checkpoint of step 3."""
    output = tmp_path_factory.mktemp("whole") / "run"
    outcome = start_here(corpus.options(output, **QUIET))
    assert outcome.status == 0, outcome.stderr
    return output


@pytest.fixture
def cut(whole: Path, tmp_path: Path) -> Path:
    """The folder of that run as it was after step 3."""
    output = tmp_path / "run"
    shutil.copytree(whole / "checkpoints" / "step_00000003", output / "checkpoints" / "step_00000003")
    return output


def rewrite_state(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change state.json of step 3, and its checksum with it."""
    checkpoint = output / "checkpoints" / "step_00000003"
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    names = [path.name for path in checkpoint.iterdir() if path.name != MANIFEST]
    checkpoint.rename(output / "partial")
    complete(output / "partial", checkpoint, file_entries(output / "partial", names))


def remarks(stdout: str) -> list[str]:
    return [line for line in stdout.splitlines() if line.startswith(("warning:", "note:"))]


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same size as the corpus's."""
    return train_sentencepiece(library_texts(20), tmp_path_factory.mktemp("other") / "tokenizer", 512)


@pytest.fixture(scope="module")
def unnamed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as an earlier version left it: nothing beside it."""
    folder = tmp_path_factory.mktemp("unnamed")
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus.train}{suffix}", folder / f"train{suffix}")
    return folder / "train"


@pytest.mark.fault("B4", "L5")
def test_an_unchanged_run_goes_on_without_a_remark(cut: Path, whole: Path, corpus: Corpus) -> None:
    outcome = start_here(corpus.options(cut, **QUIET))
    assert outcome.status == 0, outcome.stderr
    assert remarks(outcome.stdout) == []
    assert lines_of(cut, "loss") == {step: loss for step, loss in lines_of(whole, "loss").items() if step > 3}


@pytest.mark.fault("L6")
def test_a_new_run_refuses_data_of_another_tokenizer(corpus: Corpus, other_tokenizer: Path, tmp_path: Path) -> None:
    outcome = start_here(corpus.options(tmp_path / "run", data__tokenizer_model=other_tokenizer, **QUIET))
    assert (outcome.status, outcome.stderr.count("\n")) == (2, 1)
    assert f"error: {corpus.train}.bin was made with the tokenizer" in outcome.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("B4", "L5")
def test_another_tokenizer_does_not_continue_a_run(
    cut: Path, corpus: Corpus, unnamed: Path, other_tokenizer: Path
) -> None:
    """The tokenizer was trained again under the same size; the data do not say which one made them."""
    before = sorted(cut.rglob("*"))
    outcome = start_here(
        corpus.options(cut, data__tokenizer_model=other_tokenizer, data__train_data_path=f"[{unnamed}]", **QUIET)
    )
    assert (outcome.status, outcome.stderr.count("\n")) == (2, 1)
    assert "step_00000003 was trained with the tokenizer" in outcome.stderr
    assert sorted(cut.rglob("*")) == before


@pytest.mark.fault("L6")
def test_data_that_do_not_name_their_tokenizer_are_taken_with_a_remark(
    cut: Path, whole: Path, corpus: Corpus, unnamed: Path
) -> None:
    outcome = start_here(corpus.options(cut, data__train_data_path=f"[{unnamed}]", **QUIET))
    assert outcome.status == 0, outcome.stderr
    (remark,) = remarks(outcome.stdout)
    assert remark.startswith(f"note: {unnamed}.bin does not say which tokenizer made it")
    assert lines_of(cut, "loss") == {step: loss for step, loss in lines_of(whole, "loss").items() if step > 3}


@pytest.mark.fault("B4", "L5")
@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"data__train_data_path": "[{valid}]"}, "warning: the train data are not those of the checkpoint"),
        ({"data__train_data_path": "[{train}, {valid}]"}, "warning: the train data are not those of the checkpoint"),
        ({"data__sample_format": "padded"}, "warning: data.sample_format differs from the checkpoint's (padded"),
        ({"training__seed": 7}, "warning: training.seed differs from the checkpoint's (7 instead of 1234)"),
        ({"training__seq_length": 16}, "warning: training.seq_length differs from the checkpoint's (16 instead of 32)"),
    ],
)
def test_what_is_not_as_before_is_one_warning(
    cut: Path, corpus: Corpus, changes: dict[str, str], beginning: str
) -> None:
    paths = {"train": corpus.train, "valid": corpus.valid}
    filled = {key: value.format(**paths) if isinstance(value, str) else value for key, value in changes.items()}
    outcome = start_here(corpus.options(cut, **{**QUIET, **filled}))
    assert outcome.status == 0, outcome.stderr
    (remark,) = remarks(outcome.stdout)
    assert remark.startswith(beginning)
    assert set(lines_of(cut, "loss")) == {4, 5, 6}


@pytest.mark.fault("B4")
def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_remark(cut: Path, whole: Path, corpus: Corpus) -> None:
    rewrite_state(cut, lambda state: state.pop("trained_on"))
    outcome = start_here(corpus.options(cut, **QUIET))
    assert outcome.status == 0, outcome.stderr
    (remark,) = remarks(outcome.stdout)
    assert remark.startswith("note: checkpoint ")
    assert "does not say what it was trained on" in remark
    assert lines_of(cut, "loss") == {step: loss for step, loss in lines_of(whole, "loss").items() if step > 3}


@pytest.mark.fault("B4", "L6")
def test_state_and_data_name_the_same_tokenizer(whole: Path, corpus: Corpus) -> None:
    state = json.loads((whole / "checkpoints" / "step_00000006" / "state.json").read_text())
    assert state["trained_on"]["tokenizer"] == json.loads(sidecar(corpus.train).read_text())["tokenizer"]["sha256"]
    assert set(state["trained_on"]["data"]) == {"train", "valid"}


def random_states(output: Path) -> Path:
    """The file of step 3 that holds the random states of rank 0."""
    (found,) = (output / "checkpoints" / "step_00000003").glob("*.safetensors")
    return found


@pytest.mark.fault("B2")
@pytest.mark.parametrize("says_device", [True, False])
def test_a_checkpoint_of_gpus_goes_on_on_cpus_and_says_so(
    cut: Path, whole: Path, corpus: Corpus, says_device: bool
) -> None:
    """CUDA's generator has a state of 16 bytes; earlier versions wrote no device, which its size then tells."""
    tensors = load_file(random_states(cut))
    save_file({**tensors, "random.00000.device": torch.zeros(16, dtype=torch.uint8)}, random_states(cut))

    def as_on_gpus(state: dict[str, Any]) -> None:
        state["device"] = "cuda"
        if not says_device:
            del state["device"]

    rewrite_state(cut, as_on_gpus)
    outcome = start_here(corpus.options(cut, **QUIET))
    assert outcome.status == 0, outcome.stderr
    (remark,) = remarks(outcome.stdout)
    why = "device cpu instead of cuda" if says_device else "the random generator device has a state of another size"
    assert remark.startswith(f"warning: resumed on other devices or in another layout than the checkpoint's ({why})")
    assert lines_of(cut, "loss") == {step: loss for step, loss in lines_of(whole, "loss").items() if step > 3}


@pytest.mark.fault("B2")
def test_states_of_another_kind_of_device_are_not_taken_over_whatever_their_size(cut: Path, corpus: Corpus) -> None:
    rewrite_state(cut, lambda state: state.update(device="xpu"))
    outcome = start_here(corpus.options(cut, **QUIET))
    assert outcome.status == 0, outcome.stderr
    assert "(device cpu instead of xpu)" in outcome.stdout


@pytest.fixture(scope="module")
def blended(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of 6 steps stopped after 3, on a blend, whose dataset holds as many samples as were asked for."""
    output = tmp_path_factory.mktemp("blended") / "run"
    options = {**QUIET, "data__train_data_path": f"[{corpus.train}, {corpus.valid}]"}
    outcome = start_here(corpus.options(output, **options))
    assert outcome.status == 0, outcome.stderr
    shutil.rmtree(output / "checkpoints" / "step_00000006")
    return output, options


ALLOWED: dict[str, dict[str, Any]] = {
    "smaller batches": {"training__global_batch_size": 2},
    "larger batches": {"training__global_batch_size": 10},
    "fewer steps": {"training__train_steps": 4},
    "more steps": {"training__train_steps": 9},
    "both": {"training__train_steps": 5, "training__global_batch_size": 2},
    "micro-batches": {"training__micro_batch_size": 1},
    "shorter sequences": {"training__seq_length": 16},
    "longer sequences": {"training__seq_length": 64},
    "padded": {"data__sample_format": "padded"},
    "one source": {"data__train_data_path": "[{train}]"},
    "other weights": {"data__train_data_path": "[0.9, {train}, 0.1, {valid}]"},
    "split": {"data__train_data_path": "[]", "data__valid_data_path": "[]", "data__data_path": "[{valid}]"}
    | {"data__split": "1,1"},
    "ZeRO and dtype": {"deepspeed__zero_optimization__stage": 1, "training__dtype": "bf16"},
}


@pytest.mark.fault("B3")
@pytest.mark.parametrize("name", ALLOWED)
def test_every_change_that_the_documentation_allows_goes_on(
    blended: tuple[Path, dict[str, Any]], corpus: Corpus, tmp_path: Path, name: str
) -> None:
    options, output = blended[1], tmp_path / "run"
    shutil.copytree(blended[0], output)
    paths = {"train": corpus.train, "valid": corpus.valid}
    changes = {k: v.format(**paths) if isinstance(v, str) else v for k, v in ALLOWED[name].items()}
    outcome = start_here(corpus.options(output, **{**options, **changes}))
    assert outcome.status == 0, outcome.stderr
    steps = changes.get("training__train_steps", 6)
    assert set(lines_of(output, "loss")) == set(range(1, steps + 1))
    done = 3 * 4 + (steps - 3) * changes.get("training__global_batch_size", 4)
    state = json.loads((output / "checkpoints" / f"step_{steps:08d}" / "state.json").read_text())
    assert state["samples"] == done


RAMP = {**QUIET, "training__rampup_batch_size": "[2, 2, 10]", "training__global_batch_size": 8}


def test_a_run_on_a_ramp_of_the_batch_size_resumes_to_the_bit(corpus: Corpus, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start_here(corpus.options(whole, **RAMP)).status == 0
    sizes = [2, 2, 4, 6, 8, 8]
    assert list(lines_of(whole, "global_batch_size").values()) == sizes
    assert lines_of(whole, "tokens")[6] == sum(sizes) * 32
    shutil.copytree(whole / "checkpoints" / "step_00000003", cut / "checkpoints" / "step_00000003")
    outcome = start_here(corpus.options(cut, **RAMP))
    assert remarks(outcome.stdout) == []
    for key in ("loss", "grad_norm", "lr", "tokens", "samples"):
        assert lines_of(cut, key) == {step: value for step, value in lines_of(whole, key).items() if step > 3}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_ramp_of_the_batch_size_under_zero(corpus: Corpus, tmp_path: Path, stage: int) -> None:
    options = {**RAMP, "training__micro_batch_size": 1, "training__train_steps": 4}
    assert start_here(corpus.options(tmp_path / "plain", **options)).status == 0
    zero = corpus.options(tmp_path / "zero", deepspeed__zero_optimization__stage=stage, **options)
    assert start_here(zero).status == 0
    assert lines_of(tmp_path / "zero", "loss") == pytest.approx(lines_of(tmp_path / "plain", "loss"), rel=1e-5)


@pytest.mark.fault("B8")
def test_a_deterministic_run_has_an_operation_for_everything(corpus: Corpus, tmp_path: Path) -> None:
    """On CPUs, whose operations are deterministic anyway: the same losses as without."""
    options = {**QUIET, "model__hidden_dropout": 0.1, "training__train_steps": 2}
    for name in ("true", "false"):
        outcome = start_here(corpus.options(tmp_path / name, **options, training__deterministic=name))
        assert outcome.status == 0, outcome.stderr
    assert not torch.are_deterministic_algorithms_enabled()
    assert lines_of(tmp_path / "true", "loss") == lines_of(tmp_path / "false", "loss")
