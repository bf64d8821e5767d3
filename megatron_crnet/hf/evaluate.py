"""Loss and perplexity of a model over text or token files.

The loss is the mean over all tokens. Scripts derived from GaLore's divide the sum of the batches' mean losses by their
number plus one, which gives too low perplexities; that figure has its own name here.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_crnet.config.batch import BatchSizes
from megatron_crnet.config.schema import Config
from megatron_crnet.data.corpus import iter_documents
from megatron_crnet.data.corpus_stats import CorpusStats
from megatron_crnet.data.documents import DOCUMENT_LENGTHS, document_lengths
from megatron_crnet.data.fingerprint import check_tokenizer_of_data
from megatron_crnet.data.tokenizer import Tokenizer
from megatron_crnet.hf.generate import OpenModel
from megatron_crnet.utils.errors import DataError, require
from megatron_crnet.utils.progress import Progress

LONGEST = 2**20
"""Most tokens in a row."""
Ids = npt.NDArray[np.integer[Any]]
Row = Mapping[str, Tensor]
"""int64 tokens and labels [s], and loss_mask [s], 1 where a label counts: as the trainer's datasets give them. With
`document_lengths` (`data/documents.py`), attention stays within documents; `position_ids` [s] are counted without."""


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats per token.

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
def evaluate(
    model: Any, rows: Iterable[Row], batch_size: int, progress: Callable[[int], None] | None = None
) -> Evaluation:
    """Mean loss over the labels of `rows` that count.

    Args:
        model: gives `.logits` [b, s, vocabulary] for tokens [b, s].
        progress: called after each batch with the labels that have counted so far.

    Raises:
        DataError: no label counts.
    """
    total, tokens, means = 0.0, 0, []
    waiting = iter(rows)
    while group := list(islice(waiting, batch_size)):
        inputs, labels, mask = (
            torch.stack([row[key] for row in group]).to(model.device) for key in ("tokens", "labels", "loss_mask")
        )
        logits = model(inputs, use_cache=False, **_documents(group, model.device)).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        batch_total, count = float((losses.double() * mask.flatten()).sum()), int(mask.sum())
        total, tokens = total + batch_total, tokens + count
        means.append(batch_total / max(count, 1))
        if progress is not None:
            progress(tokens)
    if not tokens:
        raise DataError("the data holds no token whose loss can be measured: give at least two tokens of text")
    loss, compatible = total / tokens, sum(means) / (len(means) + 1)
    # e^700 is the largest power a float holds
    perplexities = [math.exp(min(value, 700.0)) for value in (loss, compatible)]
    return Evaluation(tokens, len(means), loss, perplexities[0], compatible, perplexities[1])


def check_memory(model: Any, rows: int, length: int) -> None:
    """Raise ConfigError where the logits, in the model's precision and in fp32, exceed the device's free memory."""
    vocabulary, width = model.config.vocab_size, 4 + model.dtype.itemsize
    needed = rows * length * vocabulary * width
    cuda = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if cuda else psutil.virtual_memory().available
    require(
        needed <= free,
        f"the logits of {rows} rows of {length} tokens take {needed / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free: "
        "lower --batch-size or --seq-length",
    )


def _documents(rows: list[Row], device: torch.device) -> dict[str, Tensor]:
    """Whom each token sees within its document, [b, 1, s, s], and the positions of the tokens, as in training."""
    if DOCUMENT_LENGTHS not in rows[0]:
        return {}
    counted = torch.arange(len(rows[0]["tokens"]))
    numbers = torch.stack([torch.arange(len(n)).repeat_interleave(n) for n in (r[DOCUMENT_LENGTHS] for r in rows)])
    mask = (numbers[:, :, None] == numbers[:, None]).tril()[:, None]
    positions = torch.stack([row.get("position_ids", counted) for row in rows])
    return {"attention_mask": mask.to(device), "position_ids": positions.to(device)}


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
    """One document per row, cut or padded: the papers' protocol. The first token of each is never a label."""
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


def within_documents(rows: Iterable[Row], eod: int) -> Iterator[Row]:
    """The rows, with the lengths of the documents that end with `eod`."""
    for row in rows:
        yield {**row, DOCUMENT_LENGTHS: document_lengths(row["tokens"], eod)}


def first_tokens(rows: Iterable[Row], count: int) -> Iterator[Row]:
    """Rows until `count` labels have counted; of the last one, only as many as are left."""
    for row in rows:
        mask = row["loss_mask"]
        yield {**row, "loss_mask": mask * (mask.cumsum(0) <= count)}
        count -= int(mask.sum())
        if count <= 0:
            return


@dataclass(frozen=True)
class Documents:
    """Token ids of documents.

    Attributes:
        ids: of all documents, [n].
        bounds: start of each in `ids`, and end of the last, [documents + 1].
    """

    ids: Ids
    bounds: Ids

    def __iter__(self) -> Iterator[Ids]:
        return (self.ids[start:end] for start, end in pairwise(self.bounds.tolist()))

    def work(self, length: int, padded: bool) -> tuple[int, int]:
        """Rows of `length` tokens, and the labels in them that count."""
        if padded:
            labels = np.clip(np.diff(self.bounds) - 1, 0, length)
            return int(np.count_nonzero(labels)), int(labels.sum())
        every = max(len(self.ids) - 1, 0)
        return -(-every // length), every


def indexed_documents(prefix: str, tokenizer: Tokenizer, needs_ends: bool = False) -> Documents:
    """The documents of PREFIX.bin.

    Args:
        needs_ends: each must end with the tokenizer's end-of-document token.

    Raises:
        DataError: the files are missing, damaged or made with another tokenizer, or ends are missing.
    """
    from megatron_crnet.data.indexed import check_ends, check_index, check_token_ids, read_index  # Megatron-Core

    files = read_index(prefix)
    check_index(files)
    check_token_ids(files, tokenizer)
    check_tokenizer_of_data(prefix, tokenizer)
    if needs_ends:
        check_ends(files, tokenizer.eod)
    ids: Ids = np.memmap(f"{prefix}.bin", dtype=files.dtype, mode="r")
    return Documents(ids, np.append(files.pointers // files.dtype.itemsize, len(ids)))


def text_documents(
    path: str | Path,
    tokenizer: Tokenizer,
    length: int = sys.maxsize,
    enough: int | None = None,
    stats: CorpusStats | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Documents:
    """The documents of text files, each ended as `crnet preprocess` ends them, in memory.

    Args:
        length: tokens of a row.
        enough: labels after which no more is read, of each document as many as a row holds; None reads all.
        stats: counts and names what was skipped.

    Raises:
        DataError: a file is missing or damaged.
    """
    ids, ends, labels = array("i"), [0], 0
    for text in iter_documents([path], stats=stats, progress=progress):
        ids.extend([*tokenizer.tokenize(text), tokenizer.eod])
        labels += min(len(ids) - ends[-1] - 1, length)
        ends.append(len(ids))
        if enough is not None and labels >= enough:
            break
    return Documents(np.frombuffer(ids, dtype=np.int32) if ids else np.empty(0, np.int32), np.array(ends))


def validation_rows(config: Config, tokenizer: Tokenizer) -> Iterator[Row]:
    """The samples whose loss a run with this configuration reports as validation_loss.

    Raises:
        ConfigError, DataError: as for the run.
    """
    from megatron_crnet.data.datasets import build_datasets  # brings Megatron-Core

    training = config.training
    samples = training.eval_steps * training.global_batch_size
    train_samples = BatchSizes.of(training).after(training.train_steps)
    valid = build_datasets(config, tokenizer, train_samples, samples).valid
    if valid is None:
        raise DataError("the configuration validates nothing: give one with training.eval_steps above 0")
    return (valid[i] for i in range(samples))


@dataclass(frozen=True)
class Work:
    """`count` rows of `length` tokens, with `labels` that count."""

    rows: Iterator[Row]
    length: int
    count: int
    labels: int


def rows_to_evaluate(
    opened: OpenModel,
    *,
    data: str | Path | None = None,
    text: str | Path | None = None,
    validation_of: Config | None = None,
    seq_length: int | None = None,
    allow_longer: bool = False,
    padded: bool = False,
    reset_attention_mask: bool = False,
    max_tokens: int | None = None,
    stats: CorpusStats | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Work:
    """Rows of one source; arguments as in `megatron_crnet.evaluate`, and as in `text_documents`."""
    tokenizer = opened.tokenizer
    length = validation_of.training.seq_length if validation_of else seq_length or opened.longest
    require(
        length <= opened.longest or allow_longer,
        f"a row of {length} tokens is longer than the model's max_position_embeddings {opened.longest}: lower "
        "--seq-length, or give --allow-longer to measure positions that it was not trained for",
    )
    require(
        length <= opened.longest or opened.model.config.traits.token_positions != "learned",
        f"a row of {length} tokens is longer than the {opened.longest} positions that the model has learned a vector "
        "for: lower --seq-length",
    )
    require(length <= LONGEST, f"a row of {length} tokens is longer than {LONGEST}: lower --seq-length")
    if validation_of is not None:
        count = validation_of.training.eval_steps * validation_of.training.global_batch_size
        rows, labels = validation_rows(validation_of, tokenizer), count * length
    else:
        if data is not None:
            documents = indexed_documents(str(data), tokenizer, needs_ends=reset_attention_mask)
        else:
            assert text is not None
            documents = text_documents(text, tokenizer, length, max_tokens, stats, progress)
        rows = padded_rows(documents, length, tokenizer.pad) if padded else packed_rows(documents, length)
        if reset_attention_mask:
            rows = within_documents(rows, tokenizer.eod)
        count, labels = documents.work(length, padded)
    if max_tokens is not None:
        rows, labels = first_tokens(rows, max_tokens), min(max_tokens, labels)
    return Work(rows, length, count, labels)


def evaluate_rows(model: Any, work: Work, batch_size: int, progress: Callable[[int], None] | None = None) -> Evaluation:
    """As `evaluate`, if a batch fits into memory (`check_memory`)."""
    check_memory(model, min(batch_size, work.count), work.length)
    return evaluate(model, work.rows, batch_size, progress)
