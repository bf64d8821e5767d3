"""Entropy of the unigram distribution: the loss of a model that knows only how frequent each token is.

A validation loss says little without it; below it, the model uses context.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_crnet.errors import DataError
from megatron_crnet.padded_dataset import PaddedDocumentDataset

BLOCK_TOKENS = 1 << 20
LIMIT_TOKENS = 1 << 26
"""Beyond this, evenly spaced blocks that come to as many tokens are counted instead of all."""

Counts = npt.NDArray[np.int64]


def unigram_entropy(dataset: Any, vocab_size: int, limit_tokens: int = LIMIT_TOKENS) -> float:
    """Entropy, in nats, of the tokens in the documents of a dataset's split.

    Packed data: every token of the split's documents. Padded data: the labels that rows use, so neither
    padding nor what was cut off. A blend: the mixture of its parts' distributions by their weights,
    which is what a loss averaged over the blend's samples is compared with.

    Args:
        dataset: a dataset that `build_datasets` returned.
        vocab_size: ids are below it.
        limit_tokens: see LIMIT_TOKENS.

    Raises:
        DataError: there is no token to count.
    """
    probabilities = unigram_distribution(dataset, vocab_size, limit_tokens)
    present = probabilities[probabilities > 0]
    return float(-(present * np.log(present)).sum())


def unigram_distribution(dataset: Any, vocab_size: int, limit_tokens: int = LIMIT_TOKENS) -> npt.NDArray[np.float64]:
    """Probabilities of the ids, [vocab_size]; see `unigram_entropy`."""
    if isinstance(dataset, BlendedDataset):
        weights = np.asarray(dataset.weights, dtype=np.float64)
        parts = [unigram_distribution(part, vocab_size, limit_tokens) for part in dataset.datasets]
        mixture: npt.NDArray[np.float64] = np.average(parts, axis=0, weights=weights)
        return mixture
    counter = _count_rows if isinstance(dataset, PaddedDocumentDataset) else _count_documents
    counts = counter(dataset, vocab_size, limit_tokens)
    if counts.sum() == 0:
        raise DataError(f"the {dataset.index_split.name} split of {dataset.dataset_path} has no token: give more text")
    probabilities: npt.NDArray[np.float64] = counts / counts.sum()
    return probabilities


def _count_documents(dataset: Any, vocab_size: int, limit_tokens: int) -> Counts:
    """Tokens of the documents dataset.indices, which lie one after the other in the .bin."""
    files = dataset.dataset
    first, last = int(dataset.indices[0]), int(dataset.indices[-1])
    pointers, dtype = files.index.sequence_pointers, np.dtype(files.index.dtype)
    begin = int(pointers[first])
    tokens = (int(pointers[last]) - begin) // dtype.itemsize + int(files.sequence_lengths[last])
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in _block_starts(tokens, BLOCK_TOKENS, limit_tokens):
        width = min(BLOCK_TOKENS, tokens - start)
        block = files.bin_reader.read(dtype=files.index.dtype, count=width, offset=begin + start * dtype.itemsize)
        counts += np.bincount(block, minlength=vocab_size)
    return counts


def _count_rows(dataset: PaddedDocumentDataset, vocab_size: int, limit_tokens: int) -> Counts:
    documents = len(dataset.indices)
    rows = max(limit_tokens // int(dataset.config.sequence_length), 1)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in _block_starts(documents, 1024, rows):
        labels = [dataset.row_ids(int(document))[1:] for document in dataset.indices[start : start + 1024]]
        counts += np.bincount(np.concatenate(labels), minlength=vocab_size)
    return counts


def _block_starts(total: int, width: int, limit: int) -> list[int]:
    """Starts of blocks that cover [0, total), or of evenly spaced ones that come to about `limit`."""
    starts = range(0, total, width)
    if total <= limit:
        return list(starts)
    chosen = np.linspace(0, len(starts), max(limit // width, 1), endpoint=False, dtype=np.int64)
    return [starts[int(i)] for i in chosen]
