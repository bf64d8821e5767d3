"""Megatron-Core's datasets, with their index caches read without pickle.

Megatron-Core loads its caches with `np.load(allow_pickle=True)`, which can run code from the file. The classes here
build the same arrays through Megatron-Core's code, in memory, and store and load them themselves: plain numbers only,
checked, and whole or absent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch import Tensor

from megatron_crnet.data.documents import DOCUMENT_LENGTHS, document_lengths
from megatron_crnet.data.indexed import Array, blocks
from megatron_crnet.utils.files import replacing

Arrays = tuple[Array, ...]

NO_TOKEN = -1
"""Padding id of samples that have no padding: no token has it, so none is masked."""


@dataclass
class DatasetConfig(GPTDatasetConfig):
    """Megatron-Core's configuration of datasets; `index_folder` replaces its `path_to_cache`."""

    index_folder: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.path_to_cache = ""


class PackedDataset(GPTDataset):
    """Documents joined and cut at the sequence length. Every sample is full, so no id stands for padding."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pad_token_id = NO_TOKEN

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        """See GPTDataset; with data.reset_attention_mask, document lengths replace its s x s mask."""
        sample: dict[str, Tensor] = super().__getitem__(idx)
        if self.config.reset_attention_mask:
            sample[DOCUMENT_LENGTHS] = document_lengths(sample["tokens"], self.config.tokenizer.eod)
        return sample

    def _build_document_sample_shuffle_indices(self) -> Arrays:
        build = super()._build_document_sample_shuffle_indices
        return _stored(self, self.index_split, ("document", "sample", "shuffle"), build)

    def belong_here(self, arrays: Arrays, values: bool) -> bool:
        """Whether arrays can be this dataset's; with `values`, every entry is checked."""
        documents, samples, order = arrays
        form = (
            documents.ndim == order.ndim == 1
            and samples.ndim == 2
            and samples.shape[1] == 2
            and len(samples) == len(order) + 1
            and len(order) >= (self.num_samples or 1)
        )
        if not form or not values:
            return form
        lengths = self.dataset.sequence_lengths
        return (
            _within(documents, int(self.indices.min()), int(self.indices.max()))
            and _within(order, 0, len(order) - 1)
            and _within(samples[:, 0], 0, len(documents) - 1)
            and all(
                (part[:, 1] >= 0).all()
                and (part[:, 1] <= lengths[documents[part[:, 0]]]).all()
                and (np.diff(part[:, 0]) >= 0).all()
                for part in blocks(samples)
            )
        )


class StoredBlend(BlendedDataset):
    """A blend whose order is stored as the other indices."""

    def _build_indices(self) -> Arrays:
        return _stored(self, self.split, ("dataset", "dataset_sample"), super()._build_indices)

    def belong_here(self, arrays: Arrays, values: bool) -> bool:
        """See PackedDataset."""
        which, samples = arrays
        form = which.ndim == samples.ndim == 1 and len(which) == len(samples) == (self.size or sum(self.weights))
        if not form or not values:
            return form
        sizes = np.array([len(dataset) for dataset in self.datasets])
        return _within(which, 0, len(sizes) - 1) and all(
            (numbers >= 0).all() and (numbers < sizes[datasets]).all()
            for datasets, numbers in zip(blocks(which), blocks(samples), strict=True)
        )


class DatasetBuilder(BlendedMegatronDatasetBuilder):
    """Megatron-Core's builder, with StoredBlend in place of BlendedDataset."""

    @staticmethod
    def build_generic_dataset(cls: Any, *args: Any) -> Any:
        """See BlendedMegatronDatasetBuilder."""
        return BlendedMegatronDatasetBuilder.build_generic_dataset(StoredBlend if cls is BlendedDataset else cls, *args)


def _stored(
    dataset: PackedDataset | StoredBlend, split: Split, names: Sequence[str], build: Callable[[], Arrays]
) -> Arrays:
    """Arrays from the cache folder; missing or damaged ones are built by every rank and stored by rank 0.

    A folder that fails costs memory and time, not the run.
    """
    folder = dataset.config.index_folder
    base = f"{dataset.unique_description_hash}-{type(dataset).__name__}-{split.name}"
    paths = [Path(folder, f"{base}-{name}_index.npy") for name in names]
    first = not dist.is_initialized() or dist.get_rank() == 0
    stored = _load(paths)
    if stored is not None and dataset.belong_here(stored, first):
        return stored
    arrays = build()
    if not first:
        return arrays
    try:
        for path, array in zip(paths, arrays, strict=True):
            with replacing(path) as temporary, temporary.open("wb") as stream:
                np.save(stream, array, allow_pickle=False)
    except OSError as error:
        remark = f"the index caches cannot be written to {folder} ({error.strerror}): each rank builds its own"
        warnings.warn(remark, stacklevel=2)
        return arrays
    return _load(paths) or arrays


def _load(paths: Sequence[Path]) -> Arrays | None:
    """The arrays, mapped; None if one is missing or not an array of integers. Nothing is unpickled."""
    if not all(path.is_file() for path in paths):  # opening a FIFO would wait
        return None
    try:
        arrays = tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
    except (OSError, ValueError, EOFError):
        return None
    return arrays if all(isinstance(array, np.ndarray) and array.dtype.kind in "iu" for array in arrays) else None


def _within(array: Array, low: int, high: int) -> bool:
    return all(low <= part.min() and part.max() <= high for part in blocks(array))
