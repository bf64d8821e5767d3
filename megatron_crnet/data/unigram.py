"""Entropy of the unigram distribution: the loss of a model that knows only how frequent each token is.

A validation loss says little without it; below it, the model uses context.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def unigram_entropy(samples: Iterable[Mapping[str, Tensor]], vocab_size: int) -> float:
    """Entropy, in nats, of the labels that count in `samples`.

    The frequencies are those of the labels themselves, so no unigram model can have a lower loss on them.

    Args:
        samples: dicts with `labels` and `loss_mask`, as datasets and batches give them.
        vocab_size: ids are below it.
    """
    return entropy_of(label_counts(samples, vocab_size))


def label_counts(samples: Iterable[Mapping[str, Tensor]], vocab_size: int) -> Tensor:
    """How often each id is a label that counts, [vocab_size], float64; counts of parts may be added."""
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for sample in samples:
        trained = sample["labels"][sample["loss_mask"] > 0]
        counts += torch.bincount(trained.flatten(), minlength=vocab_size)
    return counts


def entropy_of(counts: Tensor) -> float:
    """Entropy, in nats, of what was counted."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * probabilities.log()).sum())
