"""Loss and perplexity of a model over text or token files.

The loss is the mean over all tokens. Scripts derived from GaLore's divide the sum of the batches' mean losses by their
number plus one, so that their perplexities come out low: that figure stands beside, under its own name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_crnet.batch_sizes import BatchSizes
from megatron_crnet.config import Config
from megatron_crnet.corpus import iter_documents
from megatron_crnet.errors import DataError
from megatron_crnet.fingerprint import check_tokenizer_of_data
from megatron_crnet.tokenizer import Tokenizer

Ids = npt.NDArray[np.integer[Any]]
Row = Mapping[str, Tensor]
"""int64 tokens and labels [s], and loss_mask [s], 1 where a label counts: as the trainer's datasets give them."""


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats a token.

    Attributes:
        tokens: labels that counted.
        batches: forward passes.
        loss: mean over all tokens.
        perplexity: exp(loss).
        galore_compatible_loss: sum of the batches' mean losses / (batches + 1).
        galore_compatible_perplexity: exp of that.
    """

    tokens: int
    batches: int
    loss: float
    perplexity: float
    galore_compatible_loss: float
    galore_compatible_perplexity: float


@torch.inference_mode()
def evaluate(model: Any, rows: Iterable[Row], batch_size: int) -> Evaluation:
    """Mean loss over the labels of `rows` that count.

    Args:
        model: gives `.logits` [b, s, vocabulary] for tokens [b, s].

    Raises:
        DataError: no label counts.
    """
    total, tokens, means = 0.0, 0, []
    waiting = iter(rows)
    while group := list(islice(waiting, batch_size)):
        inputs, labels, mask = (
            torch.stack([row[key] for row in group]).to(model.device) for key in ("tokens", "labels", "loss_mask")
        )
        logits = model(inputs, use_cache=False).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        batch_total, count = float((losses.double() * mask.flatten()).sum()), int(mask.sum())
        total, tokens = total + batch_total, tokens + count
        means.append(batch_total / max(count, 1))
    if not tokens:
        raise DataError("the data holds no token whose loss can be measured: give at least two tokens of text")
    loss, compatible = total / tokens, sum(means) / (len(means) + 1)
    return Evaluation(tokens, len(means), loss, _perplexity(loss), compatible, _perplexity(compatible))


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # e^700 is the largest power a float holds


def packed_rows(documents: Iterable[Ids], length: int) -> Iterator[Row]:
    """Documents joined and cut: every token but the very first is a label once. The last row is padded."""
    rest = np.empty(0, dtype=np.int64)
    for document in documents:
        rest = np.concatenate((rest, document.astype(np.int64)))
        while len(rest) > length:
            yield _row(rest[: length + 1], length, 0)
            rest = rest[length:]
    if len(rest) > 1:
        yield _row(rest, length, 0)


def padded_rows(documents: Iterable[Ids], length: int, pad: int) -> Iterator[Row]:
    """One document a row, cut or padded: the papers' protocol. The first token of each is never a label."""
    for document in documents:
        if len(document) > 1:
            yield _row(document[: length + 1].astype(np.int64), length, pad)


def _row(ids: Ids, length: int, pad: int) -> Row:
    text = np.full(length + 1, pad, dtype=np.int64)
    text[: len(ids)] = ids
    mask = torch.zeros(length)
    mask[: len(ids) - 1] = 1.0
    joined = torch.from_numpy(text)
    return {"tokens": joined[:-1], "labels": joined[1:], "loss_mask": mask}


def first_tokens(rows: Iterable[Row], count: int) -> Iterator[Row]:
    """Rows until `count` labels have counted; of the last one, only as many as are left."""
    for row in rows:
        mask = row["loss_mask"]
        yield {**row, "loss_mask": mask * (mask.cumsum(0) <= count)}
        count -= int(mask.sum())
        if count <= 0:
            return


def indexed_documents(prefix: str, tokenizer: Tokenizer) -> Iterator[Ids]:
    """The documents of PREFIX.bin.

    Raises:
        DataError: the files are missing, damaged or made with another tokenizer.
    """
    from megatron_crnet.data_checks import check_index, check_token_ids, read_index  # brings Megatron-Core

    files = read_index(prefix)
    check_index(files)
    check_token_ids(files, tokenizer)
    check_tokenizer_of_data(prefix, tokenizer)
    ids: Ids = np.memmap(f"{prefix}.bin", dtype=files.dtype, mode="r")
    bounds = [*(files.pointers // files.dtype.itemsize), len(ids)]
    return (ids[bounds[i] : bounds[i + 1]] for i in range(files.documents))


def text_documents(path: str | Path, tokenizer: Tokenizer) -> Iterator[Ids]:
    """The documents of text files, each ended as `preprocess_data.py` ends them.

    Raises:
        DataError: a file is missing or damaged.
    """
    for text in iter_documents([path]):
        yield np.array([*tokenizer.tokenize(text), tokenizer.eod], dtype=np.int64)


def validation_rows(config: Config, tokenizer: Tokenizer) -> Iterator[Row]:
    """The very samples whose loss a run with this configuration reports as validation_loss.

    Raises:
        ConfigError, DataError: as for the run.
    """
    from megatron_crnet.data import build_datasets  # brings Megatron-Core

    training = config.training
    samples = training.eval_steps * training.global_batch_size
    train_samples = BatchSizes.of(training).after(training.train_steps)
    valid = build_datasets(config, tokenizer, train_samples, samples).valid
    if valid is None:
        raise DataError("the configuration validates nothing: give one with training.eval_steps above 0")
    return (valid[i] for i in range(samples))
