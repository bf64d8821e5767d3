"""Reads canonical weights from the files of a checkpoint or an export, and validates them.

Everything here is one process without Megatron-Core, DeepSpeed or process groups. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_crnet.checkpoint.directory import MANIFEST
from megatron_crnet.config.schema import ModelConfig
from megatron_crnet.engine.state_kinds import MASTER
from megatron_crnet.model.reference import ReferenceCRNet
from megatron_crnet.utils.errors import DataError, describe

Shapes = dict[str, tuple[int, ...]]
"""Shapes by canonical name."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be stored as, by the names of safetensors."""
Cast = Callable[[str, Tensor], Tensor]
"""A weight, by its name, in the precision in which it is wanted."""
BYTES_AT_ONCE = 2**30
"""Host memory for values that are read at once."""


Key = TypeVar("Key")


def portions(sizes: Mapping[Key, int]) -> Iterator[list[Key]]:
    """The keys in their order, as many at once as have about `BYTES_AT_ONCE` bytes."""
    keys: list[Key] = []
    waiting = 0
    for key, size in sizes.items():
        keys.append(key)
        waiting += size
        if waiting >= BYTES_AT_ONCE:
            yield keys
            keys, waiting = [], 0
    if keys:
        yield keys


class WeightSource(ABC):
    """Files that hold whole canonical weights.

    Attributes:
        where: names the files in messages.
        shapes: of all weights in them.
        dtypes: of all weights in them, as the files name them.
        checkpoint: whose weights they are; None of an export.
    """

    where: str
    shapes: Shapes
    dtypes: dict[str, str]
    checkpoint: Path | None = None

    @abstractmethod
    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The values of some weights."""

    def check(self, wanted: Shapes) -> None:
        """Compare names, shapes and types with a model's.

        Raises:
            DataError: a weight is missing, unknown, of another shape or of a type that weights do not have.
        """
        for name, shape in wanted.items():
            if name not in self.shapes:
                raise DataError(
                    f"{self.where} lacks the weight {name}, which the model has: use the configuration that the "
                    "weights were made with, or write all of them again"
                )
            if self.shapes[name] != shape:
                raise DataError(
                    f"{self.where} holds {name} in the shape {self.shapes[name]}, but the model needs {shape}: use the "
                    "configuration that the weights were made with"
                )
        for name in self.shapes:
            if name not in wanted:
                raise DataError(
                    f"{self.where} holds the weight {name}, which the model does not have: use the configuration that "
                    "the weights were made with"
                )
            if (dtype := self.dtypes[name]) not in FLOATS:
                raise DataError(
                    f"{self.where} holds {name} as {dtype}, but weights are one of {', '.join(FLOATS)}: give weights "
                    "that are not quantized"
                )

    def portions(self, cast: Cast) -> Iterator[dict[str, Tensor]]:
        """All weights as `cast` makes them, in turn, about `BYTES_AT_ONCE` of fp32 at once.

        Raises:
            DataError: see `checked`.
        """
        for names in portions({name: 4 * math.prod(shape) for name, shape in self.shapes.items()}):
            yield self.checked(names, cast)

    def checked(self, names: Iterable[str], cast: Cast) -> dict[str, Tensor]:
        """As `read`, then `cast`, with a check of every value.

        Raises:
            DataError: a value is not finite, or a matrix or a norm is zero all over; a bias may be.
        """
        found = {}
        for name, stored in self.read(names).items():
            tensor = cast(name, stored)
            after = "" if stored.dtype == tensor.dtype else f" as {str(tensor.dtype).removeprefix('torch.')}"
            if not tensor.isfinite().all():
                raise DataError(
                    f"{self.where} holds values in {name} that are not finite{after}: use weights of a good run"
                )
            if tensor.dim() and not name.endswith(".bias") and not tensor.any():
                raise DataError(
                    f"{self.where} holds only zeros in {name}{after}: use weights that were trained and written"
                )
            found[name] = tensor
        return found


class ShardReader(HuggingFaceStorageReader):
    """Reads the tensors of a checkpoint, whose headers are known.

    Args:
        headers: see `headers_of`.
    """

    def __init__(self, checkpoint: Path, headers: Metadata) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint, self._headers = checkpoint, headers

    def read_metadata(self) -> Metadata:
        """What all files hold, and where."""
        return self._headers


def headers_of(checkpoint: Path) -> Metadata:
    """What the files of a checkpoint hold, and where; read once while its manifest, written last, is the same.

    Raises:
        Exception: whatever the library raises on files that are not its own.
    """
    try:
        status = (checkpoint / MANIFEST).stat()
    except FileNotFoundError:  # not sealed yet
        return HuggingFaceStorageReader(str(checkpoint)).read_metadata()
    return _sealed_headers(str(checkpoint), status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _sealed_headers(checkpoint: str, *_manifest: int) -> Metadata:
    return HuggingFaceStorageReader(checkpoint).read_metadata()


class CheckpointWeights(WeightSource):
    """The fp32 master weights of a checkpoint, whatever layout has written it."""

    def __init__(self, checkpoint: Path) -> None:
        self.where, self.checkpoint = f"checkpoint {checkpoint}", checkpoint
        try:
            self._reader = ShardReader(checkpoint, headers_of(checkpoint))
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise DataError(f"{self.where} has no readable weights ({describe(error)}): use another one") from error
        saved = self._reader.read_metadata().state_dict_metadata
        masters: dict[str, TensorStorageMetadata] = {
            name.removeprefix(f"{MASTER}."): about
            for name, about in sorted(saved.items())
            if name.startswith(f"{MASTER}.") and isinstance(about, TensorStorageMetadata)
        }
        names = {dtype: name for name, dtype in FLOATS.items()}
        self.shapes = {name: tuple(about.size) for name, about in masters.items()}
        self.dtypes = {n: names.get(m.properties.dtype, str(m.properties.dtype)) for n, m in masters.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See WeightSource."""
        # NaN, so that a part which no file holds is found
        found = {f"{MASTER}.{name}": torch.full(self.shapes[name], torch.nan) for name in names}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
                dcp.load(dict(found), storage_reader=self._reader, no_dist=True)
        except (CheckpointException, OSError, SafetensorError) as error:
            raise DataError(f"{self.where} cannot be read ({describe(error)}): use another one") from error
        return {name.removeprefix(f"{MASTER}."): tensor for name, tensor in found.items()}


class ExportWeights(WeightSource):
    """model.safetensors, or the files that its index names."""

    def __init__(self, folder: Path) -> None:
        self.where = f"export {folder}"
        self._file_of: dict[str, Path] = {}
        self.shapes, self.dtypes = {}, {}
        try:
            for file in _files_of(folder):
                self._look_into(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            raise DataError(f"{self.where} has no readable weights ({error}): export the checkpoint again") from error

    def _look_into(self, file: Path) -> None:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                if name in self._file_of:
                    raise ValueError(f"{name} stands in {self._file_of[name].name} and in {file.name}")
                part: Any = opened.get_slice(name)
                self._file_of[name], self.shapes[name] = file, tuple(part.get_shape())
                self.dtypes[name] = part.get_dtype()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See WeightSource."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        found = {}
        for file, wanted in by_file.items():
            with safe_open(file, framework="pt") as opened:
                found.update({name: opened.get_tensor(name) for name in wanted})
        return found


def _files_of(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"no {WEIGHTS}")
    files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    for name in files:
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"{INDEX} names {name!r}, which is not a file of this folder")
    return [folder / name for name in files]


def canonical_weights_of(model: ModelConfig) -> dict[str, nn.Parameter]:
    """All weights of a model on the meta device; those that are not trained need no gradient."""
    with torch.device("meta"):
        return dict(ReferenceCRNet(model).named_parameters())


def canonical_shapes(model: ModelConfig) -> Shapes:
    """Shapes of all weights of a model."""
    return {name: tuple(weight.shape) for name, weight in canonical_weights_of(model).items()}
