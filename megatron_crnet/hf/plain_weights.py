"""Weights by the names and in the shapes of Transformers' own classes (`plain.py`), as canonical ones and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_crnet.checkpoint.weight_files import ExportWeights, Shapes, WeightSource
from megatron_crnet.hf.plain import PlainFormat
from megatron_crnet.model.reference import EMBEDDING, HEAD
from megatron_crnet.utils.errors import DataError

CANONICAL = re.compile(r"model\.(?:layers\.(?P<layer>\d+)\.)?(?P<module>.+)\.(?P<suffix>\w+)")


@dataclass(frozen=True)
class Stored:
    """A tensor of theirs: canonical weights joined by rows.

    Attributes:
        parts: their names, and how many rows each has.
        is_transposed: the whole of it is.
    """

    parts: Mapping[str, int]
    is_transposed: bool = False

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Of the tensor, given those of the canonical weights."""
        joined = (sum(self.parts.values()), *shapes[next(iter(self.parts))][1:])
        return joined[::-1] if self.is_transposed else joined

    def join(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The tensor."""
        joined = torch.cat([weights[name] for name in self.parts])
        return joined.T.contiguous() if self.is_transposed else joined

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """The canonical weights, each in memory of its own."""
        rows = tensor.T if self.is_transposed else tensor
        parts = rows.split([*self.parts.values()])
        return {
            name: part.clone(memory_format=torch.contiguous_format)
            for name, part in zip(self.parts, parts, strict=True)
        }


def stored_as(about: PlainFormat, shapes: Shapes, prefix: str) -> dict[str, Stored]:
    """Their tensors by name, in the order of the canonical weights.

    Args:
        shapes: of all canonical weights.
        prefix: of the names of all weights but the output layer's.
    """
    parts: dict[str, dict[str, int]] = {}
    transposed = set()
    for name, shape in shapes.items():
        theirs = name
        if found := CANONICAL.fullmatch(name):
            module = about.modules.get(found["module"], found["module"])
            layer = "" if found["layer"] is None else f"{about.layers}.{found['layer']}."
            theirs = f"{prefix}{layer}{module}.{found['suffix']}"
            if module in about.transposed and len(shape) == 2:
                transposed.add(theirs)
        parts.setdefault(theirs, {})[name] = shape[0]
    return {name: Stored(rows, name in transposed) for name, rows in parts.items()}


class ToPlain(WeightSource):
    """A full-rank model's weights as theirs.

    Args:
        shapes: of the model's canonical weights, in its order.
    """

    def __init__(self, source: WeightSource, about: PlainFormat, shapes: Shapes) -> None:
        self.where, self.checkpoint, self._source = source.where, source.checkpoint, source
        self._stored = stored_as(about, shapes, about.prefix)
        self.shapes = {name: stored.shape(shapes) for name, stored in self._stored.items()}
        self.dtypes = {name: source.dtypes[next(iter(stored.parts))] for name, stored in self._stored.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See WeightSource."""
        return {name: self._stored[name].join(self._source.read(self._stored[name].parts)) for name in names}


class FromPlain(WeightSource):
    """The canonical weights in a folder of theirs.

    Args:
        shapes: of the model's canonical weights, in its order.
    """

    def __init__(self, folder: Path, about: PlainFormat, shapes: Shapes) -> None:
        self._files = files = ExportWeights(folder)
        self.where = files.where
        for name in [name for name in files.shapes if name.endswith(about.buffers)]:
            del files.shapes[name]
        is_base = not any(name.startswith(about.prefix) for name in files.shapes)
        self._about, self._prefix = about, "" if is_base else about.prefix
        self._stored = stored_as(about, shapes, self._prefix)
        self._of = {part: name for name, stored in self._stored.items() for part in stored.parts}
        self.shapes = shapes
        self.dtypes = {part: files.dtypes.get(name, "") for part, name in self._of.items()}

    def check(self, wanted: Shapes) -> None:
        """See WeightSource; what is wrong has their name."""
        embedding, files = self._of[EMBEDDING], self._files
        if HEAD not in wanted and {HEAD, embedding} <= files.shapes.keys():
            head, tied = (files.read([name])[name] for name in (HEAD, embedding))
            if not torch.equal(head, tied):
                raise DataError(
                    f"{self.where} ties the output layer to the embedding, but holds {HEAD} with other values: set "
                    "tie_word_embeddings to false in its config.json, or remove that weight"
                )
            del files.shapes[HEAD]
        stored = stored_as(self._about, wanted, self._prefix)
        files.check({name: one.shape(wanted) for name, one in stored.items()})

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See WeightSource."""
        wanted = {*names}
        found: dict[str, Tensor] = {}
        for name in dict.fromkeys(self._of[part] for part in self._of if part in wanted):
            parts = self._stored[name].split(self._files.read([name])[name])
            found |= {part: value for part, value in parts.items() if part in wanted}
        return found
