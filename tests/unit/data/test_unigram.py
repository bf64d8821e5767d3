from __future__ import annotations

import math

import pytest
import torch

from megatron_crnet.data.unigram import entropy_of, label_counts


def _sample(labels: list[int], mask: list[int]) -> dict[str, torch.Tensor]:
    return {"labels": torch.tensor(labels), "loss_mask": torch.tensor(mask, dtype=torch.float32)}


def unigram_entropy(samples: list[dict[str, torch.Tensor]], vocab_size: int) -> float:
    return entropy_of(label_counts(samples, vocab_size))


def test_it_is_the_entropy_of_the_labels_over_all_samples() -> None:
    samples = [_sample([1, 1, 2, 3], [1] * 4), _sample([1, 1, 2, 3], [1] * 4)]
    expected = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert unigram_entropy(samples, 5) == pytest.approx(expected)


def test_labels_that_are_not_trained_on_do_not_count() -> None:
    assert unigram_entropy([_sample([1, 2, 0, 0], [1, 1, 0, 0])], 3) == pytest.approx(math.log(2))


def test_one_token_has_no_entropy() -> None:
    assert unigram_entropy([_sample([4, 4], [1, 1])], 5) == 0
