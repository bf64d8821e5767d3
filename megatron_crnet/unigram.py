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
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for sample in samples:
        trained = sample["labels"][sample["loss_mask"] > 0]
        counts += torch.bincount(trained.flatten(), minlength=vocab_size)
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * probabilities.log()).sum())
