"""From a dataset to the micro-batches of one data-parallel rank.

Step k of a run uses the samples [S, S + G) of the dataset, whatever the layout: micro-batch m of rank d holds
S + (m D + d) b + [0, b), with S the samples of the steps before, G the step's batch, D the data-parallel ranks, b the
micro-batch. G is the same for all steps, or grows on a ramp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megatron_crnet.config.batch import BatchSizes
from megatron_crnet.data.documents import DOCUMENT_LENGTHS
from megatron_crnet.utils.errors import ConfigError, DataError
from megatron_crnet.utils.signals import leave_signals_to_parent

SAMPLE_KEYS = ("tokens", "labels", "loss_mask", "position_ids")

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class MicroBatchIndices:
    """Iterates over the sample numbers of each micro-batch of one rank."""

    first_sample: int
    num_steps: int
    sizes: BatchSizes
    micro_batch_size: int
    dp_rank: int
    dp_size: int

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.micro_batch_size * self.dp_size
        offset = self.first_sample + self.dp_rank * self.micro_batch_size
        # every size is a multiple of the stride, so the steps follow each other without a gap
        for start in range(offset, offset + self._samples, stride):
            yield list(range(start, start + self.micro_batch_size))

    def __len__(self) -> int:
        return self._samples // (self.micro_batch_size * self.dp_size)

    @property
    def _samples(self) -> int:
        return self.sizes.after(self.num_steps, self.first_sample) - self.first_sample

    def per_step(self) -> Iterator[int]:
        """Micro-batches of this rank in each step."""
        for size in self.sizes.steps(self.first_sample, self.num_steps):
            yield size // (self.micro_batch_size * self.dp_size)


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
    sizes: BatchSizes | None = None,
) -> Iterator[list[Batch]]:
    """Iterate over optimizer steps: for each, this rank's micro-batches.

    Args:
        dataset: map-style; a sample is a dict with SAMPLE_KEYS and perhaps `document_lengths`; other keys are dropped.
        first_sample: samples that earlier steps used.
        num_workers: processes that read ahead; they end with the iterator.
        num_steps: steps to yield; None means as many as the dataset holds.
        sizes: of the steps, where they are not all of `global_batch_size`; then `num_steps` must be given.

    Returns:
        An iterator over lists of dicts of tensors [micro_batch_size, s]; document lengths are joined, [documents].
        torch's random state is not touched.

    Raises:
        ConfigError: sizes that do not divide.
        DataError: the dataset is too small for `num_steps`.
    """
    if global_batch_size % (micro_batch_size * dp_size):
        raise ConfigError(
            f"training.global_batch_size {global_batch_size} does not divide by micro_batch_size {micro_batch_size} x "
            f"{dp_size} data-parallel ranks: use a multiple of {micro_batch_size * dp_size}"
        )
    sizes = sizes or BatchSizes(global_batch_size, global_batch_size)
    steps = max(len(dataset) - first_sample, 0) // global_batch_size if num_steps is None else num_steps
    needed = sizes.after(steps, first_sample)
    if steps and needed > len(dataset):
        raise DataError(
            f"{steps} steps of {global_batch_size} samples from sample {first_sample} on need {needed} samples, but "
            f"the dataset holds {len(dataset)}: build it for more samples"
        )
    indices = MicroBatchIndices(first_sample, steps, sizes, micro_batch_size, dp_rank, dp_size)
    return _grouped(dataset, indices, num_workers)


def _grouped(dataset: Any, indices: MicroBatchIndices, num_workers: int) -> Iterator[list[Batch]]:
    loader = DataLoader(
        dataset,
        batch_sampler=indices,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=torch.cuda.is_available(),  # a copy to the GPU waits for no other memory
        generator=torch.Generator(),  # else the loader draws a seed from the global state, which dropout shares
    )
    batches = iter(loader)
    for count in indices.per_step():
        yield list(islice(batches, count))


def _collate(samples: Sequence[Mapping[str, Tensor]]) -> Batch:
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in SAMPLE_KEYS}
    if DOCUMENT_LENGTHS in samples[0]:
        batch[DOCUMENT_LENGTHS] = torch.cat([sample[DOCUMENT_LENGTHS] for sample in samples])
    return batch
