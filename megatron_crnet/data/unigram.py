"""Entropy of the unigram distribution: a model whose validation loss is below it uses context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def label_counts(samples: Iterable[Mapping[str, Tensor]], vocab_size: int) -> Tensor:
    """How often each id is a label with `loss_mask` above 0, [vocab_size], float64; counts of parts may be added."""
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for sample in samples:
        trained = sample["labels"][sample["loss_mask"] > 0]
        counts += torch.bincount(trained.flatten(), minlength=vocab_size)
    return counts


def entropy_of(counts: Tensor) -> float:
    """Entropy of the counted labels in nats: no unigram model has a lower loss on them."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * probabilities.log()).sum())
