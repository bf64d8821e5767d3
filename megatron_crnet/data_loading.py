"""From a dataset to the micro-batches of one data-parallel rank.

Step k of a run uses the samples [k G, (k+1) G) of the dataset, whatever the layout: micro-batch m of rank d
holds k G + (m D + d) b + [0, b), with G the global batch, D the data-parallel ranks, b the micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megatron_crnet.errors import ConfigError, DataError
from megatron_crnet.interruption import leave_signals_to_parent

SAMPLE_KEYS = ("tokens", "labels", "loss_mask", "position_ids")

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class MicroBatchIndices:
    """Iterates over the sample numbers of each micro-batch of one rank."""

    first_sample: int
    num_steps: int
    global_batch_size: int
    micro_batch_size: int
    dp_rank: int
    dp_size: int

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.micro_batch_size * self.dp_size
        offset = self.first_sample + self.dp_rank * self.micro_batch_size
        for start in range(offset, offset + self.num_steps * self.global_batch_size, stride):
            yield list(range(start, start + self.micro_batch_size))

    def __len__(self) -> int:
        return self.num_steps * self.global_batch_size // (self.micro_batch_size * self.dp_size)


def global_batches(
    dataset: Any,
    *,
    first_sample: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int,
    num_steps: int | None = None,
) -> Iterator[list[Batch]]:
    """Iterate over optimizer steps: for each, this rank's micro-batches.

    Args:
        dataset: map-style; a sample is a dict with SAMPLE_KEYS, other keys are dropped.
        first_sample: samples that earlier steps used; step k of the run starts at k * global_batch_size.
        num_workers: processes that read ahead; they end with the iterator.
        num_steps: steps to yield; None means as many as the dataset holds.

    Returns:
        An iterator over lists of dicts of tensors [micro_batch_size, s]. torch's random state is not touched.

    Raises:
        ConfigError: sizes that do not divide.
        DataError: the dataset is too small for `num_steps`.
    """
    if global_batch_size % (micro_batch_size * dp_size):
        raise ConfigError(
            f"training.global_batch_size {global_batch_size} does not divide by micro_batch_size {micro_batch_size} x "
            f"{dp_size} data-parallel ranks: use a multiple of {micro_batch_size * dp_size}"
        )
    available = max(len(dataset) - first_sample, 0) // global_batch_size
    steps = available if num_steps is None else num_steps
    if steps > available:
        raise DataError(
            f"{steps} steps of {global_batch_size} samples from sample {first_sample} on need "
            f"{first_sample + steps * global_batch_size} samples, but the dataset holds {len(dataset)}: "
            "build it for more samples"
        )
    indices = MicroBatchIndices(first_sample, steps, global_batch_size, micro_batch_size, dp_rank, dp_size)
    return _grouped(dataset, indices, num_workers)


def _grouped(dataset: Any, indices: MicroBatchIndices, num_workers: int) -> Iterator[list[Batch]]:
    loader = DataLoader(
        dataset,
        batch_sampler=indices,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # else the loader draws a seed from the global state, which dropout shares
    )
    micro_batches = indices.global_batch_size // (indices.micro_batch_size * indices.dp_size)
    batches = iter(loader)
    while group := list(islice(batches, micro_batches)):
        yield group


def _collate(samples: Sequence[Mapping[str, Tensor]]) -> Batch:
    return {key: torch.stack([sample[key] for sample in samples]) for key in SAMPLE_KEYS}
