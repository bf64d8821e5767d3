"""What the data section asks for, checked against the files before Megatron-Core opens them.

Megatron-Core answers a bad file with an assertion, a number out of range, or an endless loop (a split
without tokens). Every check here is O(1) in the size of the corpus, or bounded, but `check_index`: one pass over the
.idx, 20 bytes per document.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
"""Documents whose last token is looked at."""
SCAN_BYTES = 1 << 26
"""A .bin up to this size is searched whole for ids beyond the vocabulary, a larger one in as much of it."""
CHECKED_AT_ONCE = 1 << 20
"""Entries of an index that are checked together, which bounds the memory that it takes."""

Share = tuple[float, float]
"""Share of a prefix's documents, from and to."""


@dataclass(frozen=True)
class Blend:
    """Prefixes and, where several are mixed, their weights."""

    prefixes: list[str]
    weights: list[float] | None


@dataclass(frozen=True)
class Source:
    """The blend of one split and the share of each prefix's documents that belongs to it."""

    blend: Blend
    share: Share


@dataclass(frozen=True)
class IndexedFiles:
    """A .bin/.idx pair whose sizes agree."""

    prefix: str
    dtype: np.dtype[np.integer]
    pointers: npt.NDArray[np.int64]
    """Byte offset of each document in the .bin, [documents]; mapped, not read."""
    bin_bytes: int
    lengths: npt.NDArray[np.int32]
    """Tokens of each document, [documents]; mapped, not read."""
    boundaries: npt.NDArray[np.int64]
    """Megatron-Core's documents: the first sequence of each, and the number of sequences; mapped, not read."""

    @property
    def documents(self) -> int:
        """Sequences in the index; `preprocess` writes one a document."""
        return len(self.pointers)

    def documents_in(self, share: Share) -> tuple[int, int]:
        """First document of `share` and the one after its last, rounded as Megatron-Core does."""
        return round(share[0] * self.documents), round(share[1] * self.documents)

    def tokens_in(self, share: Share) -> int:
        """Tokens of the documents in `share`."""
        first, end = self.documents_in(share)
        bounds = [int(self.pointers[i]) if i < self.documents else self.bin_bytes for i in (first, end)]
        return (bounds[1] - bounds[0]) // self.dtype.itemsize


def sources_of(data: DataConfig) -> dict[str, Source]:
    """The blend and share of each split that has one, by the split's name.

    Raises:
        ConfigError: no data, data_path together with another, a bad weight or a bad split.
    """
    separate = {name: paths for name in SPLITS if (paths := getattr(data, f"{name}_data_path"))}
    if not data.data_path and not separate:
        raise ConfigError("data.data_path is empty: give the prefix of a .bin/.idx pair, made by crnet preprocess")
    if data.data_path and separate:
        name = next(iter(separate))
        raise ConfigError(
            f"data.data_path and data.{name}_data_path are both set, but a split is either cut from data_path or has "
            "files of its own: remove one"
        )
    if separate:
        return {
            name: Source(parse_blend(paths, f"data.{name}_data_path"), (0.0, 1.0)) for name, paths in separate.items()
        }
    blend = parse_blend(data.data_path, "data.data_path")
    return {name: Source(blend, share) for name, share in zip(SPLITS, parse_split(data.split), strict=True) if share}


def parse_blend(entries: Sequence[str | float], key: str) -> Blend:
    """Read `prefix prefix ...` or `weight prefix weight prefix ...`: a number is a weight, text a prefix.

    Raises:
        ConfigError: weights for some prefixes only, or text that looks like a number, which could be meant as either.
    """
    unclear = [entry for entry in entries if isinstance(entry, str) and _looks_like_number(entry)]
    if unclear:
        raise ConfigError(
            f"{key} has {unclear[0]!r} in quotes, which may be a weight or a prefix: write {unclear[0]} without quotes "
            f"for a weight, ./{unclear[0]} for a prefix"
        )
    prefixes = [entry for entry in entries if isinstance(entry, str)]
    if len(prefixes) == len(entries):
        return Blend(prefixes, None)
    weights = [entry for entry in entries if not isinstance(entry, str)]
    if [*entries[::2]] != weights or [*entries[1::2]] != prefixes or len(weights) != len(prefixes):
        raise ConfigError(
            f"{key} {list(entries)} mixes weights and prefixes unevenly: write prefix prefix ..., or weight prefix "
            "weight prefix ... (a prefix that is a number as ./2024)"
        )
    return Blend(prefixes, [float(weight) for weight in weights] if len(prefixes) > 1 else None)


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


def check_index(files: IndexedFiles) -> None:
    """Raise DataError unless every length, pointer and boundary of the .idx fits its neighbours."""
    for start in range(0, files.documents, CHECKED_AT_ONCE):
        lengths = files.lengths[start : start + CHECKED_AT_ONCE]
        pointers = files.pointers[start : start + CHECKED_AT_ONCE + 1]
        sizes = lengths[: len(pointers) - 1].astype(np.int64) * files.dtype.itemsize
        wrong = lengths < 0
        wrong[: len(sizes)] |= np.diff(pointers) != sizes
        if wrong.any():
            number = start + int(wrong.argmax())
            raise DataError(
                f"{files.prefix}.idx gives document {number} the length {files.lengths[number]} at byte "
                f"{files.pointers[number]}, but the next one does not follow it: it is damaged, preprocess again"
            )
    for start in range(0, len(files.boundaries), CHECKED_AT_ONCE):
        if (np.diff(files.boundaries[start : start + CHECKED_AT_ONCE + 1]) < 0).any():
            raise DataError(f"{files.prefix}.idx counts its documents backwards: it is damaged, preprocess again")


IdRange = tuple[int, int]
"""Smallest and largest token id."""


def id_range(files: IndexedFiles) -> IdRange:
    """The smallest and largest token id of the .bin, as far as SCAN_BYTES looks."""
    ids: npt.NDArray[np.integer] = np.memmap(f"{files.prefix}.bin", dtype=files.dtype, mode="r")
    whole = files.bin_bytes <= SCAN_BYTES
    starts = [0] if whole else np.linspace(0, len(ids), 64, endpoint=False, dtype=np.int64).tolist()
    width = len(ids) if whole else SCAN_BYTES // 64 // files.dtype.itemsize
    blocks = [ids[start : start + width] for start in starts]
    return min(int(block.min()) for block in blocks), max(int(block.max()) for block in blocks)


def check_token_ids(files: IndexedFiles, tokenizer: Tokenizer, found: IdRange | None = None) -> None:
    """Raise DataError if the .bin holds an id that the tokenizer does not have.

    Args:
        found: its `id_range`, where it is known.
    """
    smallest, largest = found or id_range(files)
    worst = smallest if smallest < 0 else largest
    if not 0 <= worst < tokenizer.vocab_size:
        raise DataError(
            f"{files.prefix}.bin holds the token id {worst}, but the tokenizer has the ids 0 to "
            f"{tokenizer.vocab_size - 1}: it was made with another tokenizer; preprocess again with this one, or "
            "set data.tokenizer_model to that one"
        )


def check_ends(files: IndexedFiles, eod: int) -> None:
    """Raise DataError if no document ends with `eod`, so that none could be told from the next.

    ENDS_CHECKED documents are looked at, evenly spread.
    """
    ids: npt.NDArray[np.integer] = np.memmap(f"{files.prefix}.bin", dtype=files.dtype, mode="r")
    some = np.linspace(0, files.documents - 1, min(files.documents, ENDS_CHECKED), dtype=np.int64)
    ends = (files.pointers[some] // files.dtype.itemsize + files.lengths[some] - 1)[files.lengths[some] > 0]
    if not (ids[ends] == eod).any():
        raise DataError(
            f"the documents of {files.prefix}.bin do not end with the tokenizer's end-of-document token {eod}, by "
            "which data.reset_attention_mask and data.eod_mask_loss tell them apart: preprocess again with it, or "
            "leave these fields out"
        )


def check_enough(files: IndexedFiles, split: str, share: Share, config: Config) -> None:
    """Raise DataError unless the split has one sample's worth of this prefix."""
    first, end = files.documents_in(share)
    tokens, needed = files.tokens_in(share), config.training.seq_length + 1
    if config.data.sample_format == "padded":
        if end > first and not has_label(files, share):
            raise DataError(
                f"no document in the {split} split of {files.prefix} has two tokens, so that nothing can be trained or "
                "measured on it: preprocess longer documents, or use data.sample_format packed"
            )
        needed = 2
    if end <= first or tokens < needed:
        raise DataError(
            f"the {split} split of {files.prefix} has {tokens} tokens in {end - first} documents, but one sample needs "
            f"{needed}: give more text, raise its share in data.split, or lower training.seq_length"
        )


def has_label(files: IndexedFiles, share: Share) -> bool:
    """Whether some document of the share has two tokens, the second of which is a label."""
    first, end = files.documents_in(share)
    starts = range(first, end, CHECKED_AT_ONCE)
    return any((files.lengths[start : min(start + CHECKED_AT_ONCE, end)] > 1).any() for start in starts)


def check_cache_folder(folder: Path) -> None:
    """Make the folder of the index caches; raise ConfigError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise ConfigError(f"data.cache_path {folder} cannot be written: set data.cache_path to a folder that can")


def _read_header(idx_path: str) -> tuple[np.dtype[np.integer], int, int]:
    try:
        with open(idx_path, "rb") as stream:
            header = stream.read(INDEX_HEADER.size)
    except OSError as error:
        raise DataError(f"{idx_path} cannot be read ({error.strerror}): correct its permissions") from error
    damaged = DataError(f"{idx_path} is not a Megatron index, or is cut: preprocess again")
    if len(header) < INDEX_HEADER.size or not header.startswith(INDEX_MAGIC):
        raise damaged
    _, version, code, sequences, boundaries = INDEX_HEADER.unpack(header)
    try:
        dtype: np.dtype[np.integer] = np.dtype(DType.dtype_from_code(code))
    except ValueError as error:
        raise damaged from error
    if version != 1 or not np.issubdtype(dtype, np.integer):
        raise damaged
    return dtype, sequences, boundaries


def _looks_like_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
