"""A model in files, of which one layer at a time is in memory; and rows of tokens from text to run through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_crnet.checkpoint.directory import FINAL, saved_step
from megatron_crnet.checkpoint.weight_files import WeightSource
from megatron_crnet.config.positions import PositionTable, position_table
from megatron_crnet.config.schema import Config
from megatron_crnet.data.tokenizer import Tokenizer
from megatron_crnet.hf.evaluate import indexed_documents, packed_rows, text_documents
from megatron_crnet.hf.export import cast, named_tokenizer
from megatron_crnet.hf.generate import open_files
from megatron_crnet.model.reference import EMBEDDING, LEARNED_POSITIONS, ReferenceLayer
from megatron_crnet.utils.errors import DataError, require, require_positive

LAYER = "model.layers.{}."
"""Start of the names of a layer's weights."""


@dataclass(frozen=True)
class SourceModel:
    """An export, a model of Transformers' own classes or a checkpoint.

    Attributes:
        notes: lines on newer checkpoints that were skipped.
    """

    path: Path
    config: Config
    tokenizer: Tokenizer
    weights: WeightSource
    notes: tuple[str, ...] = ()

    @property
    def table(self) -> PositionTable:
        """Its linear maps."""
        return position_table(self.config.model)

    @property
    def step(self) -> int | None:
        """Of training, where the weights are a checkpoint's."""
        checkpoint = self.weights.checkpoint
        return saved_step(checkpoint) if checkpoint and FINAL.fullmatch(checkpoint.name) else None

    @property
    def longest(self) -> int:
        """Most tokens of a row."""
        return self.config.model.max_position_embeddings or self.config.training.seq_length

    def read(self, prefix: str) -> dict[str, Tensor]:
        """The fp32 weights whose names begin so, by the rest of their names.

        Raises:
            DataError: a value is not finite, or a matrix or a norm is zero all over.
        """
        names = [name for name in self.weights.shapes if name.startswith(prefix)]
        return {n.removeprefix(prefix): w for n, w in self.weights.checked(names, partial(cast, "fp32")).items()}

    def embed(self, rows: Tensor) -> Tensor:
        """The residual stream before the first layer, [rows, s, h], on the CPU; rows: tokens, [rows, s]."""
        hidden = F.embedding(rows, self.read(EMBEDDING)[""])
        if LEARNED_POSITIONS in self.weights.shapes:
            hidden += self.read(LEARNED_POSITIONS)[""][: rows.shape[1]]
        return hidden

    def layer(self, index: int) -> ReferenceLayer:
        """A layer with its weights, on the CPU."""
        return layer_of(self.config, index, self.read(LAYER.format(index)))


def layer_of(config: Config, index: int, weights: Mapping[str, Tensor]) -> ReferenceLayer:
    """Layer `index` of a model, with these weights."""
    with torch.device("meta"):
        layer = ReferenceLayer(config.model, position_table(config.model), index)
    layer.load_state_dict(weights, assign=True)
    return layer.requires_grad_(False)


def open_source(path: Path, tokenizer: str | None = None) -> SourceModel:
    """Open an export, a model of Transformers' own classes, a checkpoint, a folder of checkpoints or a run.

    Args:
        tokenizer: path of the tokenizer; None takes the model's own.

    Raises:
        DataError: there is no model, or it lacks weights.
        ConfigError: its sizes contradict each other.
    """
    config, weights, notes = open_files(path, tokenizer)
    return SourceModel(path, config, named_tokenizer(config), weights, tuple(notes))


def calibration_rows(
    source: SourceModel,
    *,
    text: Path | None = None,
    prefix: str | None = None,
    tokens: int,
    seq_length: int | None = None,
) -> Tensor:
    """The first tokens of a text or of PREFIX.bin, documents joined and cut into rows; [rows, s].

    Args:
        tokens: so many, in whole rows, of which there is at least one.
        seq_length: s; None takes the model's longest.

    Raises:
        ConfigError: rows longer than the model was trained for.
        DataError: the text is missing, damaged or shorter than a row.
    """
    length = seq_length or source.longest
    require_positive("calibration", tokens=tokens, seq_length=length)
    require(
        length <= source.longest,
        f"a row of {length} tokens is longer than the model's max_position_embeddings {source.longest}: lower "
        "--seq-length",
    )
    count = max(tokens // length, 1)
    documents = (
        indexed_documents(prefix, source.tokenizer)
        if prefix is not None
        else text_documents(text or Path(), source.tokenizer, length, count * length)
    )
    rows = [row["tokens"] for row in islice(packed_rows(documents, length), count) if bool(row["loss_mask"].all())]
    if not rows:
        raise DataError(
            f"{prefix or text} holds {len(documents.ids):,} tokens, but a row of calibration has {length}: give more "
            "text, or lower --seq-length"
        )
    return torch.stack(rows)
