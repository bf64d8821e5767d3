"""Documents of packed samples: where they begin, so that attention and positions stay within them.

A document ends with the tokenizer's end-of-document token (EOD), as in Megatron-Core. The parts of cut documents at the
two ends of a sample count as documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DOCUMENT_LENGTHS = "document_lengths"
"""Key of the document lengths of a sample or micro-batch, on the host; absent if attention covers whole rows."""


def document_lengths(tokens: Tensor, eod: int) -> Tensor:
    """Lengths of the documents in `tokens` [s], which add up to s: int64 [documents]."""
    ends = tokens == eod
    ends[-1] = True  # cut here, if not ended
    return F.pad(ends.nonzero().flatten() + 1, (1, 0)).diff()


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A micro-batch on `device`, but for the document lengths."""
    return {k: x if k == DOCUMENT_LENGTHS else x.to(device, non_blocking=True) for k, x in batch.items()}


@dataclass(frozen=True)
class PackedDocuments:
    """The documents of one micro-batch: made once and shared by all its layers, recomputed ones included.

    Attributes:
        rows: lengths of the documents of each row; each row adds up to s.
        position_ids: position of every token, [b, s], for the rotary embedding.
        offsets: starts of the documents and end of the last in the concatenated rows, int32 [documents + 1], on the
            device; for kernels of variable length.
    """

    rows: Sequence[Sequence[int]]
    position_ids: Tensor
    offsets: Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(max(row) for row in self.rows)

    def positions_of(self, angles: Tensor) -> Tensor:
        """Of the rotary embedding's angles [s, 1, 1, d], those at this micro-batch's positions, [s, b, 1, d]."""
        return angles[:, 0, 0][self.position_ids.t()].unsqueeze(2)

    def split(self, x: Tensor) -> list[Tensor]:
        """x [s, b, heads, d], cut into documents [1, heads, length, d]; views."""
        rows = x.permute(1, 2, 0, 3).split(1)
        return [part for row, lengths in zip(rows, self.rows, strict=True) for part in row.split(list(lengths), dim=2)]

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """The inverse of `split`."""
        parts = iter(parts)
        return torch.cat([torch.cat([next(parts).permute(2, 0, 1, 3) for _ in row]) for row in self.rows], dim=1)


def documents_of(batch: Mapping[str, Tensor]) -> PackedDocuments | None:
    """The documents of a micro-batch; None if every row is one, where plain causal attention does the same."""
    lengths = batch.get(DOCUMENT_LENGTHS)
    if lengths is None:
        return None
    positions = batch["position_ids"]
    if len(lengths) == len(positions):
        return None
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    rows = list(_rows(lengths.tolist(), positions.shape[1]))
    return PackedDocuments(rows, positions, offsets.to(positions.device, non_blocking=True))


def _rows(lengths: list[int], row_length: int) -> Iterator[list[int]]:
    row: list[int] = []
    filled = 0
    for length in lengths:
        row.append(length)
        filled += length
        if filled == row_length:
            yield row
            row, filled = [], 0
    assert not row, "no document spans two rows"
