"""Attention within documents by the entry point: what counts as trained, what validation and evaluation agree on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_crnet.config.loading import load_config
from megatron_crnet.config.model_size import flops_per_token
from megatron_crnet.data.tokenizer import load_tokenizer
from megatron_crnet.hf.evaluate import evaluate, validation_rows
from megatron_crnet.hf.generate import open_model
from tests.integration.conftest import Corpus, lines_of, start, start_here
from tests.unit.data_helpers import read_indexed, write_indexed

pytestmark = pytest.mark.fault("documents")

DOCUMENTS: dict[str, Any] = {
    "data__reset_attention_mask": True,
    "data__reset_position_ids": True,
    "data__eod_mask_loss": True,
}
ACROSS: dict[str, Any] = dict.fromkeys(DOCUMENTS, False)


@pytest.fixture(scope="module")
def short(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The corpus, cut into documents of one to twenty tokens before their end."""
    folder = tmp_path_factory.mktemp("short")
    eod = load_tokenizer("sentencepiece", str(corpus.tokenizer)).eod
    for name in ("train", "valid"):
        ids = [token for document in read_indexed(getattr(corpus, name)) for token in document]
        documents, start_at = [], 0
        while start_at < len(ids):
            length = 1 + start_at * 7 % 20
            documents.append([*ids[start_at : start_at + length], eod])
            start_at += length
        write_indexed(folder / name, documents)
    return dataclasses.replace(corpus, train=folder / "train", valid=folder / "valid")


@pytest.fixture(scope="module")
def within(short: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose attention stays within documents."""
    output = tmp_path_factory.mktemp("within") / "run"
    outcome = start_here(short.options(output, **DOCUMENTS))
    assert outcome.status == 0, outcome.stderr
    return output


def test_tokens_count_what_is_trained_and_operations_what_is_attended_to(
    within: Path, short: Corpus, tmp_path: Path
) -> None:
    outcome = start_here(short.options(tmp_path / "across"))
    assert outcome.status == 0, outcome.stderr
    across = tmp_path / "across"
    assert lines_of(across, "tokens")[6] == 6 * 4 * 32
    # about every eleventh token is the end of a document
    assert 0.8 * 6 * 4 * 32 < lines_of(within, "tokens")[6] < 0.97 * 6 * 4 * 32
    model = load_config(within / "config.yaml").model
    whole, linear = flops_per_token(model, 32), flops_per_token(model, 0)
    for step in range(1, 7):
        for output, share in ((across, 1.0), (within, lines_of(within, "tokens")[6] / (6 * 4 * 32))):
            found = lines_of(output, "tflops_per_device")[step] * 1e12 / lines_of(output, "tokens_per_s")[step]
            if output == across:
                assert found == pytest.approx(whole)
                unmasked = lines_of(output, "tflops_per_device_whole_attention")[step]
                assert unmasked - lines_of(output, "tflops_per_device")[step] == pytest.approx(
                    (whole - linear) * lines_of(output, "tokens_per_s")[step] / 1e12
                )
            else:
                assert linear < found * share < (linear + whole) / 2 * 1.1
    assert lines_of(within, "loss")[1] != lines_of(across, "loss")[1]


def test_two_ranks_follow_one_although_their_masks_differ(within: Path, short: Corpus, tmp_path: Path) -> None:
    output = tmp_path / "two"
    result = start(short.options(output, **DOCUMENTS, deepspeed__zero_optimization__stage=2), ranks=2)
    assert result.returncode == 0, result.stderr
    assert lines_of(output, "tokens") == lines_of(within, "tokens")
    for key in ("loss", "grad_norm", "validation_loss"):
        assert lines_of(output, key) == pytest.approx(lines_of(within, key), rel=1e-5)


def test_an_evaluation_repeats_the_validation_of_the_run(within: Path) -> None:
    opened = open_model(within)
    config = load_config(within / "config.yaml")
    found = evaluate(opened.model, validation_rows(config, opened.tokenizer), 4).loss
    assert found == pytest.approx(lines_of(within, "validation_loss")[6], rel=1e-5)
    across = dataclasses.replace(config, data=dataclasses.replace(config.data, **{k[6:]: v for k, v in ACROSS.items()}))
    assert evaluate(opened.model, validation_rows(across, opened.tokenizer), 4).loss != pytest.approx(found, rel=1e-3)


def test_a_resumed_run_says_that_samples_are_read_in_another_way(within: Path, short: Corpus) -> None:
    outcome = start_here(short.options(within, **ACROSS, training__train_steps=7, training__eval_steps=0))
    assert outcome.status == 0, outcome.stderr
    for name in ("reset_attention_mask", "reset_position_ids", "eod_mask_loss"):
        assert f"warning: data.{name} differs from the checkpoint's (False instead of True)" in outcome.stdout


def test_a_batch_of_ends_alone_is_a_bad_step_by_its_own_name_in_every_layout(short: Corpus, tmp_path: Path) -> None:
    """No token counts: there is no mean loss and no gradient."""
    eod = load_tokenizer("sentencepiece", str(short.tokenizer)).eod
    write_indexed(tmp_path / "ends", [[eod]] * 2000)
    ends = dataclasses.replace(short, train=tmp_path / "ends", valid=tmp_path / "ends")
    outcome = start_here(ends.options(tmp_path / "one", **DOCUMENTS))
    assert (outcome.status, outcome.stderr.count("\n")) == (3, 1), outcome.stderr
    wanted = "the global batch holds no token whose loss counts, but must hold one at step 1 (learning rate"
    assert wanted in outcome.stderr
    assert "unigram entropy" not in outcome.stdout, "nothing counts in the validation either"
    for name, options in (
        ("skips", {"faults__on_bad_step": "skip"}),
        ("skips-two", {"faults__on_bad_step": "skip", "parallel__tensor_model_parallel_size": 2}),
    ):
        output = tmp_path / name
        result = start(ends.options(output, **DOCUMENTS, **options), ranks=2 if name == "skips-two" else 1)
        assert result.returncode == 0, result.stderr
        assert lines_of(output, "skipped_steps") == {step: step for step in range(1, 7)}
        assert result.stdout.count("is skipped: the global batch holds no token whose loss counts") == 6
        assert "has no token whose loss counts" in result.stdout
        state = json.loads((output / "checkpoints" / "step_00000006" / "state.json").read_text())
        assert (state["tokens"], state["samples"], state["adam_steps"], state["skipped"]) == (0, 24, 0, 6)
