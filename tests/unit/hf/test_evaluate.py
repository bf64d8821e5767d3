"""Rows, and losses over them: every token once, the mean over tokens, GaLore's figure beside it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_crnet.data.documents import DOCUMENT_LENGTHS
from megatron_crnet.hf.evaluate import (
    evaluate,
    first_tokens,
    indexed_documents,
    packed_rows,
    padded_rows,
    text_documents,
    within_documents,
)
from megatron_crnet.hf.export_config import hugging_face_fields
from megatron_crnet.hf.modeling_crnet import CRNetConfig, CRNetForCausalLM
from megatron_crnet.model.reference import ReferenceCRNet
from megatron_crnet.utils.errors import DataError
from tests.helpers import EOD, document_numbers, positions_within, tiny_config
from tests.unit.data_helpers import VOCAB, PlainTokenizer, write_indexed
from tests.unit.export_helpers import EXPORTED, random_weights


class NextIs:
    """Logits under which the token t is followed by t + 1 with odds of 3 to 1 against each other one."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, tokens: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        self.seen.append(tuple(tokens.shape))
        logits = torch.zeros(*tokens.shape, 4)
        logits.scatter_(-1, ((tokens + 1) % 4)[..., None], math.log(3))
        return SimpleNamespace(logits=logits)


GOOD, BAD = -math.log(3 / 6), -math.log(1 / 6)


def documents(*ids: list[int]) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    return [np.array(one, dtype=np.int32) for one in ids]


def labels_of(rows: Any) -> list[list[int]]:
    return [row["labels"][row["loss_mask"] > 0].tolist() for row in rows]


def flat(rows: Any) -> list[int]:
    return [label for row in labels_of(rows) for label in row]


@pytest.mark.parametrize("length", range(1, 12))
def test_packed_rows_have_every_token_but_the_first_as_a_label_once(length: int) -> None:
    parts = documents([1, 2, 3], [4], [], [5, 6, 7, 8, 9, 10])
    rows = list(packed_rows(parts, length))
    assert flat(rows) == list(range(2, 11))
    for row in rows:
        assert row["tokens"].shape == row["labels"].shape == row["loss_mask"].shape == (length,)
        counted = row["loss_mask"] > 0
        assert torch.equal(row["tokens"][counted] + 1, row["labels"][counted])


def test_padded_rows_are_documents_cut_and_filled() -> None:
    rows = list(padded_rows(documents([1, 2, 3, 4, 5, 6], [7], [8, 9]), 3, pad=0))
    assert labels_of(rows) == [[2, 3, 4], [9]]
    assert rows[1]["tokens"].tolist() == [8, 9, 0]


def test_max_tokens_counts_labels() -> None:
    rows = list(packed_rows(documents(list(range(10))), 4))
    assert flat(first_tokens(rows, 6)) == [1, 2, 3, 4, 5, 6]
    assert labels_of(first_tokens(rows, 4)) == [[1, 2, 3, 4]]
    assert flat(first_tokens(rows, 100)) == list(range(1, 10))


def test_the_mean_is_over_tokens_and_galores_figure_over_batches_and_one() -> None:
    model = NextIs()
    found = evaluate(model, padded_rows(documents([0, 1, 2, 3], [0, 3], [1, 2]), 3, pad=0), batch_size=2)
    assert model.seen == [(2, 3), (1, 3)]
    assert (found.tokens, found.batches) == (5, 2)
    assert found.loss == pytest.approx((4 * GOOD + BAD) / 5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.galore_compatible_loss == pytest.approx(((3 * GOOD + BAD) / 4 + GOOD) / 3)
    assert found.galore_compatible_perplexity == pytest.approx(math.exp(found.galore_compatible_loss))


def test_without_a_label_there_is_no_figure() -> None:
    with pytest.raises(DataError, match="at least two tokens"):
        evaluate(NextIs(), padded_rows(documents([1]), 3, pad=0), 2)


def test_documents_come_from_token_files_and_from_text(tmp_path: Path) -> None:
    wanted = [[5, 6, 7], [8], [9, 10]]
    tokenizer = PlainTokenizer()
    prefix = write_indexed(tmp_path / "data", wanted)
    assert [one.tolist() for one in indexed_documents(prefix, tokenizer)] == wanted
    (tmp_path / "text.txt").write_text("some text")
    (found,) = text_documents(tmp_path / "text.txt", tokenizer)
    assert found.tolist() == [*tokenizer.tokenize("some text"), tokenizer.eod]
    high = write_indexed(tmp_path / "other", [[VOCAB + 1]])
    with pytest.raises(DataError, match="made with another tokenizer"):
        indexed_documents(high, tokenizer)


def test_documents_without_ends_cannot_be_kept_apart(tmp_path: Path) -> None:
    tokenizer = PlainTokenizer()
    prefix = write_indexed(tmp_path / "endless", [[3, 4, 5], [6, 7]])
    indexed_documents(prefix, tokenizer)
    with pytest.raises(DataError, match="do not end with the tokenizer's end-of-document token"):
        indexed_documents(prefix, tokenizer, needs_ends=True)


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("name", ["llama", *EXPORTED])
def test_documents_are_kept_apart_and_positions_counted_as_in_training(name: str, restarts: bool) -> None:
    config = tiny_config(model=EXPORTED.get(name, {}), data={"reset_attention_mask": True})
    reference, weights = ReferenceCRNet(config.model), random_weights(config)
    reference.load_state_dict(weights)
    model = CRNetForCausalLM(CRNetConfig(**hugging_face_fields(config))).eval()
    model.load_state_dict(weights, strict=False)
    ids = [[3, 4, 5, EOD], [6, EOD], [7, 8, 9, 10, 11, 12, 13, EOD], [14, 15, EOD]]
    rows: list[Any] = list(within_documents(packed_rows(documents(*ids), 8), EOD))
    if restarts:
        rows = [{**row, "position_ids": positions_within(row[DOCUMENT_LENGTHS])} for row in rows]
    tokens, labels, mask = (torch.stack([row[key] for row in rows]) for key in ("tokens", "labels", "loss_mask"))
    positions = torch.stack([row["position_ids"] for row in rows]) if restarts else None
    logits = reference(tokens, document_numbers(config, tokens), positions)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    wanted = float((losses * mask.flatten()).sum() / mask.sum())
    assert evaluate(model, rows, batch_size=2).loss == pytest.approx(wanted, rel=1e-5)
