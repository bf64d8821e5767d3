"""The data section, checked against the .bin/.idx files before Megatron-Core opens them.

On a bad file Megatron-Core asserts, indexes out of range, or loops forever (a split without tokens). Every check here
takes constant or bounded time, but for `check_index`: one pass over the .idx, 20 bytes per document.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import DType

from megatron_crnet.config.schema import Config, DataConfig
from megatron_crnet.data.tokenizer import Tokenizer
from megatron_crnet.utils.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test")
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the dtype, sequences, document boundaries (documents + 1)."""
ENDS_CHECKED = 1000
"""Documents whose last token is checked."""
SCAN_BYTES = 1 << 26
"""Bytes of a .bin that are searched for ids beyond the vocabulary; a smaller one is searched whole."""
CHECKED_AT_ONCE = 1 << 20
"""Entries of an index that are checked together, to bound the memory that it takes."""

Array = npt.NDArray[Any]
Share = tuple[float, float]
"""Share of a prefix's documents, from and to."""
WHOLE: Share = (0.0, 1.0)
IdRange = tuple[int, int]
"""Smallest and largest token id."""


@dataclass(frozen=True)
class Blend:
    """The prefixes of a split, their weights where several are mixed, and the share of their documents."""

    prefixes: list[str]
    weights: list[float] | None
    share: Share = WHOLE


@dataclass(frozen=True)
class IndexedFiles:
    """A .bin/.idx pair whose sizes agree; the arrays are mapped, not read.

    Attributes:
        pointers: byte offset of each document in the .bin, [documents].
        lengths: tokens of each document, [documents].
        boundaries: Megatron-Core's documents: the first sequence of each, and the number of sequences.
    """

    prefix: str
    dtype: np.dtype[np.integer]
    pointers: npt.NDArray[np.int64]
    bin_bytes: int
    lengths: npt.NDArray[np.int32]
    boundaries: npt.NDArray[np.int64]

    @property
    def documents(self) -> int:
        """Sequences in the index; `preprocess` writes one per document."""
        return len(self.pointers)

    def ids(self) -> npt.NDArray[np.integer]:
        """All token ids, mapped."""
        return np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r")

    def documents_in(self, share: Share) -> tuple[int, int]:
        """First document of `share` and the one after its last, rounded as Megatron-Core does."""
        return round(share[0] * self.documents), round(share[1] * self.documents)

    def tokens_in(self, share: Share) -> int:
        """Tokens of the documents in `share`."""
        first, end = (int(self.pointers[i]) if i < self.documents else self.bin_bytes for i in self.documents_in(share))
        return (end - first) // self.dtype.itemsize


def blends_of(data: DataConfig) -> dict[str, Blend]:
    """The blend of each split that has one, by the split's name.

    Raises:
        ConfigError: no data, data_path together with another, a bad weight or a bad split.
    """
    separate = {name: paths for name in SPLITS if (paths := getattr(data, f"{name}_data_path"))}
    if not data.data_path and not separate:
        raise ConfigError("data.data_path is empty: give the prefix of a .bin/.idx pair, made by crnet preprocess")
    if data.data_path and separate:
        raise ConfigError(
            f"data.data_path and data.{next(iter(separate))}_data_path are both set, but a split is either cut from "
            "data_path or has files of its own: remove one"
        )
    if separate:
        return {name: parse_blend(paths, f"data.{name}_data_path") for name, paths in separate.items()}
    shares = zip(SPLITS, parse_split(data.split), strict=True)
    return {name: parse_blend(data.data_path, "data.data_path", share) for name, share in shares if share}


def parse_blend(entries: Sequence[str | float], key: str, share: Share = WHOLE) -> Blend:
    """Read `prefix prefix ...` or `weight prefix weight prefix ...`: a number is a weight, text a prefix.

    Raises:
        ConfigError: weights for some prefixes only, or text that looks like a number, which could be meant as either.
    """
    prefixes = [entry for entry in entries if isinstance(entry, str)]
    for entry in prefixes:
        with suppress(ValueError):
            float(entry)
            raise ConfigError(
                f"{key} has {entry!r} in quotes, which may be a weight or a prefix: write {entry} without quotes for "
                f"a weight, ./{entry} for a prefix"
            )
    if len(prefixes) == len(entries):
        return Blend(prefixes, None, share)
    weights = [entry for entry in entries if not isinstance(entry, str)]
    if [*entries[::2]] != weights or [*entries[1::2]] != prefixes or len(weights) != len(prefixes):
        raise ConfigError(
            f"{key} {list(entries)} mixes weights and prefixes unevenly: write prefix prefix ..., or weight prefix "
            "weight prefix ... (a prefix that is a number as ./2024)"
        )
    return Blend(prefixes, [float(weight) for weight in weights] if len(prefixes) > 1 else None, share)


def parse_split(split: str) -> list[Share | None]:
    """Shares of train, validation and test; None for a split without any.

    Raises:
        ConfigError: not one to three non-negative numbers with a positive sum.
    """
    parts = split.split(",")
    plain = all(re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*", part) for part in parts)  # all that Megatron-Core reads
    if not plain or len(parts) > len(SPLITS) or sum(map(float, parts)) <= 0:
        raise ConfigError(
            f"data.split is {split!r}, but must give the relative sizes of train, validation and test: "
            "write 969,30,1, say"
        )
    shares: list[Share | None] = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    return shares


def read_index(prefix: str) -> IndexedFiles:
    """Check that PREFIX.bin and PREFIX.idx are whole and belong together.

    Raises:
        DataError: a file is missing, cut, of another kind, or without a document.
    """
    bin_path, idx_path = f"{prefix}.bin", f"{prefix}.idx"
    for path in (bin_path, idx_path):
        if not os.path.isfile(path):
            stem, suffix = os.path.splitext(prefix)
            remedy = f"give the prefix {stem}, without {suffix}" if suffix in (".bin", ".idx") else f"correct {prefix}"
            raise DataError(f"{path} does not exist: make it with crnet preprocess, or {remedy}")
    dtype, sequences, boundaries = _read_header(idx_path)
    if sequences == 0:
        raise DataError(f"{idx_path} holds no document: preprocess text that is not empty")
    lengths_end = INDEX_HEADER.size + 4 * sequences
    pointers_end = lengths_end + 8 * sequences
    needed, size = pointers_end + 8 * boundaries, os.path.getsize(idx_path)
    if size == needed + sequences:
        raise DataError(f"{idx_path} holds modes, as multimodal data does, which is not text: give data without images")
    if size != needed or not boundaries:
        raise DataError(
            f"{idx_path} has {size} bytes, but its {sequences} documents need {needed}: it is cut or damaged, "
            "preprocess again"
        )
    lengths: npt.NDArray[np.int32] = np.memmap(idx_path, np.int32, "r", INDEX_HEADER.size, (sequences,))
    pointers: npt.NDArray[np.int64] = np.memmap(idx_path, np.int64, "r", lengths_end, (sequences,))
    ends: npt.NDArray[np.int64] = np.memmap(idx_path, np.int64, "r", pointers_end, (boundaries,))
    needed, size = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize, os.path.getsize(bin_path)
    if size != needed or lengths[-1] < 0 or pointers[0] != 0 or ends[0] != 0 or ends[-1] != sequences:
        raise DataError(
            f"{bin_path} has {size} bytes, but its index describes {needed}: one of the two is cut or of another run, "
            "preprocess again"
        )
    if size == 0:
        raise DataError(f"{bin_path} is empty: preprocess text that is not empty")
    return IndexedFiles(prefix, dtype, pointers, size, lengths, ends)


def _read_header(idx_path: str) -> tuple[np.dtype[np.integer], int, int]:
    try:
        with open(idx_path, "rb") as stream:
            header = stream.read(INDEX_HEADER.size)
    except OSError as error:
        raise DataError(f"{idx_path} cannot be read ({error.strerror}): correct its permissions") from error
    with suppress(struct.error, ValueError):  # cut, or no such dtype
        magic, version, code, sequences, boundaries = INDEX_HEADER.unpack(header)
        dtype: np.dtype[np.integer] = np.dtype(DType.dtype_from_code(code))
        if magic == INDEX_MAGIC and version == 1 and np.issubdtype(dtype, np.integer):
            return dtype, sequences, boundaries
    raise DataError(f"{idx_path} is not a Megatron index, or is cut: preprocess again")


def blocks(array: Array, overlap: int = 0) -> Iterator[Array]:
    """`array` in parts of CHECKED_AT_ONCE entries, and `overlap` of the next part."""
    return (array[start : start + CHECKED_AT_ONCE + overlap] for start in range(0, len(array), CHECKED_AT_ONCE))


def check_index(files: IndexedFiles) -> None:
    """Raise DataError unless every length, pointer and boundary of the .idx fits its neighbours."""
    pairs = zip(blocks(files.lengths), blocks(files.pointers, 1), strict=True)
    for block, (lengths, pointers) in enumerate(pairs):
        sizes = lengths[: len(pointers) - 1].astype(np.int64) * files.dtype.itemsize
        wrong = lengths < 0
        wrong[: len(sizes)] |= np.diff(pointers) != sizes
        if wrong.any():
            number = block * CHECKED_AT_ONCE + int(wrong.argmax())
            raise DataError(
                f"{files.prefix}.idx gives document {number} the length {files.lengths[number]} at byte "
                f"{files.pointers[number]}, but the next one does not follow it: it is damaged, preprocess again"
            )
    if any((np.diff(part) < 0).any() for part in blocks(files.boundaries, 1)):
        raise DataError(f"{files.prefix}.idx counts its documents backwards: it is damaged, preprocess again")


def id_range(files: IndexedFiles) -> IdRange:
    """The smallest and largest token id in up to SCAN_BYTES of the .bin."""
    ids = files.ids()
    whole = files.bin_bytes <= SCAN_BYTES
    starts = [0] if whole else np.linspace(0, len(ids), 64, endpoint=False, dtype=np.int64).tolist()
    width = len(ids) if whole else SCAN_BYTES // 64 // files.dtype.itemsize
    parts = [ids[start : start + width] for start in starts]
    return min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)


def check_token_ids(files: IndexedFiles, tokenizer: Tokenizer, found: IdRange | None = None) -> None:
    """Raise DataError if the .bin holds an id that the tokenizer does not have; `found` is its known `id_range`."""
    smallest, largest = found or id_range(files)
    worst = smallest if smallest < 0 else largest
    if not 0 <= worst < tokenizer.vocab_size:
        raise DataError(
            f"{files.prefix}.bin holds the token id {worst}, but the tokenizer has the ids 0 to "
            f"{tokenizer.vocab_size - 1}: it was made with another tokenizer; preprocess again with this one, or "
            "set data.tokenizer_model to that one"
        )


def check_ends(files: IndexedFiles, eod: int) -> None:
    """Raise DataError if none of ENDS_CHECKED documents, evenly spread, ends with `eod`."""
    some = np.linspace(0, files.documents - 1, min(files.documents, ENDS_CHECKED), dtype=np.int64)
    ends = (files.pointers[some] // files.dtype.itemsize + files.lengths[some] - 1)[files.lengths[some] > 0]
    if not (files.ids()[ends] == eod).any():
        raise DataError(
            f"the documents of {files.prefix}.bin do not end with the tokenizer's end-of-document token {eod}, by "
            "which data.reset_attention_mask and data.eod_mask_loss tell them apart: preprocess again with it, or "
            "leave these fields out"
        )


def check_enough(files: IndexedFiles, split: str, share: Share, config: Config) -> None:
    """Raise DataError unless `share` of this prefix is enough for one sample."""
    first, end = files.documents_in(share)
    tokens, needed = files.tokens_in(share), config.training.seq_length + 1
    if config.data.sample_format == "padded":
        needed = 2  # the second token of a document is its first label
        if end > first and not any((lengths > 1).any() for lengths in blocks(files.lengths[first:end])):
            raise DataError(
                f"no document in the {split} split of {files.prefix} has two tokens, so that nothing can be trained or "
                "measured on it: preprocess longer documents, or use data.sample_format packed"
            )
    if end <= first or tokens < needed:
        raise DataError(
            f"the {split} split of {files.prefix} has {tokens} tokens in {end - first} documents, but one sample needs "
            f"{needed}: give more text, raise its share in data.split, or lower training.seq_length"
        )
