"""Megatron-Core's datasets, with their index caches read without pickle.

Megatron-Core loads its caches with `np.load(allow_pickle=True)`, which runs whatever a file tells it to. The classes
here build the same arrays through Megatron-Core's code, in memory, and store and load them themselves: plain numbers
only, checked, and whole or absent, because they are renamed into place.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch import Tensor

from megatron_crnet.data.documents import DOCUMENT_LENGTHS, document_lengths

Arrays = tuple[npt.NDArray[Any], ...]

NO_TOKEN = -1
"""Padding id of samples that have no padding: no token has it, so none is masked."""
CHECKED_AT_ONCE = 1 << 20
"""Entries of an index that are checked together, which bounds the memory that it takes."""


class PackedDataset(GPTDataset):
    """Documents joined and cut at the sequence length. Every sample is full, so no id stands for padding."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pad_token_id = NO_TOKEN

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        """See GPTDataset. Where attention stays within documents, the lengths of these stand for its s x s mask."""
        sample: dict[str, Tensor] = super().__getitem__(idx)
        if self.config.reset_attention_mask:
            sample[DOCUMENT_LENGTHS] = document_lengths(sample["tokens"], self.config.tokenizer.eod)
        return sample

    def _build_document_sample_shuffle_indices(self) -> Arrays:
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        names = [f"{base}-{name}_index.npy" for name in ("document", "sample", "shuffle")]
        build = super()._build_document_sample_shuffle_indices
        return _stored(self, names, build, self._belong_here)

    def _belong_here(self, arrays: Arrays, values: bool) -> bool:
        """Whether arrays can be this dataset's; with `values`, every entry is looked at."""
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
                for part in _parts(samples)
            )
        )


class StoredBlend(BlendedDataset):
    """A blend whose order is stored as the other indices are."""

    def _build_indices(self) -> Arrays:
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.split.name}"
        names = [f"{base}-{name}_index.npy" for name in ("dataset", "dataset_sample")]
        return _stored(self, names, super()._build_indices, self._belong_here)

    def _belong_here(self, arrays: Arrays, values: bool) -> bool:
        which, samples = arrays
        form = which.ndim == samples.ndim == 1 and len(which) == len(samples) == (self.size or sum(self.weights))
        if not form or not values:
            return form
        sizes = np.array([len(dataset) for dataset in self.datasets])
        return _within(which, 0, len(sizes) - 1) and all(
            (part >= 0).all() and (part < sizes[which[start : start + len(part)]]).all()
            for start, part in zip(range(0, len(samples), CHECKED_AT_ONCE), _parts(samples), strict=True)
        )


class DatasetBuilder(BlendedMegatronDatasetBuilder):
    """Megatron-Core's builder with StoredBlend for BlendedDataset, which it names itself."""

    @staticmethod
    def build_generic_dataset(cls: Any, *args: Any) -> Any:
        """See BlendedMegatronDatasetBuilder."""
        cls = StoredBlend if cls is BlendedDataset else cls
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, *args)


def _stored(
    dataset: PackedDataset | StoredBlend,
    names: Sequence[str],
    build: Callable[[], Arrays],
    belong_here: Callable[[Arrays, bool], bool],
) -> Arrays:
    """Arrays from the cache folder; those that are missing or damaged are built, and stored by rank 0.

    Every rank can build them alone, so a folder that fails costs memory and time, not the run.
    """
    folder = dataset.config.path_to_cache
    if not folder:
        return _in_memory(dataset, build)
    first = not dist.is_initialized() or dist.get_rank() == 0
    paths = [Path(folder, name) for name in names]
    stored = _load(paths)
    if stored is not None and belong_here(stored, first):
        return stored
    arrays = _in_memory(dataset, build)
    if not first:
        return arrays
    try:
        for path, array in zip(paths, arrays, strict=True):
            _save(path, array)
    except OSError as error:
        remark = f"the index caches cannot be written to {folder} ({error.strerror}): each rank builds its own"
        warnings.warn(remark, stacklevel=2)
        return arrays
    return _load(paths) or arrays


def _load(paths: Sequence[Path]) -> Arrays | None:
    """The arrays, mapped; None if one is missing, or not an array of integers. Nothing is unpickled."""
    if not all(path.is_file() for path in paths):  # opening a FIFO would wait
        return None
    try:
        arrays = tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
    except (OSError, ValueError, EOFError):
        return None
    return arrays if all(isinstance(array, np.ndarray) and array.dtype.kind in "iu" for array in arrays) else None


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _in_memory(dataset: PackedDataset | StoredBlend, build: Callable[[], Arrays]) -> Arrays:
    """What Megatron-Core builds when it has no folder for caches."""
    config = dataset.config
    dataset.config = copy.copy(config)
    dataset.config.path_to_cache = ""
    try:
        with _without_warnings(GPTDataset, BlendedDataset):
            return build()
    finally:
        dataset.config = config


@contextmanager
def _without_warnings(*classes: type) -> Iterator[None]:
    """Megatron-Core warns that it stores nothing, which is what it was told."""
    loggers = [logging.getLogger(cls.__module__) for cls in classes]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _parts(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    return (array[start : start + CHECKED_AT_ONCE] for start in range(0, len(array), CHECKED_AT_ONCE))


def _within(array: npt.NDArray[Any], low: int, high: int) -> bool:
    return all(low <= part.min() and part.max() <= high for part in _parts(array))
