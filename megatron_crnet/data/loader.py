"""From a dataset to the micro-batches of one data-parallel rank.

Step k of a run uses the samples [S, S + G) of the dataset, whatever the layout: micro-batch m of rank d holds
S + (m D + d) b + [0, b), with S the samples of the steps before, G the step's batch, D the data-parallel ranks, b the
micro-batch. G is the same for all steps, or grows on a ramp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
        sizes: of the steps, if not all `global_batch_size`; needs `num_steps`.

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
    stride, batch_sizes = micro_batch_size * dp_size, sizes.steps(first_sample, steps)

    def batches() -> Iterator[list[Batch]]:
        # every size is a multiple of the stride, so the steps follow each other without a gap
        starts = range(first_sample + dp_rank * micro_batch_size, needed, stride)
        loader = DataLoader(
            dataset,
            batch_sampler=(list(range(start, start + micro_batch_size)) for start in starts),
            num_workers=num_workers,
            collate_fn=_collate,
            worker_init_fn=leave_signals_to_parent,
            pin_memory=torch.cuda.is_available(),  # copies to the GPU are asynchronous only from pinned memory
            generator=torch.Generator(),  # else the loader draws a seed from the global state, which dropout shares
        )
        micro_batches = iter(loader)
        for size in batch_sizes:
            yield list(islice(micro_batches, size // stride))

    return batches()


def _collate(samples: Sequence[Mapping[str, Tensor]]) -> Batch:
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in SAMPLE_KEYS}
    if DOCUMENT_LENGTHS in samples[0]:
        batch[DOCUMENT_LENGTHS] = torch.cat([sample[DOCUMENT_LENGTHS] for sample in samples])
    return batch
