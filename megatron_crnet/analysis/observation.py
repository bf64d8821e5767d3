"""The paper's observation on a model: are a layer's outputs the previous layer's and a low-rank difference?

For outputs Y of a linear map and P of the same map in the previous layer, both [N tokens, m], relative errors of

    LR_r(Y)                     the plain low-rank approximation, and
    b P + LR_r(Y - b P)         with the best b (`difference.py`),

where LR_r is the best approximation of rank r. Their ratio is what CR-Net (arXiv 2509.18993) is built on: 0.4 to 0.97
there, at r = h/4. LR_r may be any matrix of N rows; that a layer's X A B can reach it is not said (`fit.py` says it).

The same is taken of the residual stream behind a layer, with the stream before it as P: for comparison, because these
two have much in common by construction.

Experts have no outputs of the layer before: it gave them other tokens. Of gate, up and down of all experts of a layer
there is LR_r(Y), each expert's on the tokens that it is given; and what the experts give together has a P.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_crnet.analysis.maps import maps_by_input
from megatron_crnet.analysis.outputs import MapOutputs, each_map
from megatron_crnet.analysis.source import SourceModel
from megatron_crnet.analysis.stream import MIXTURE, STREAM

POINTS = 48
"""Singular values that are kept of a spectrum, at most: indices in geometric steps."""


@dataclass(frozen=True)
class RankErrors:
    """Relative errors at one rank; those with the previous outputs are None where there are none."""

    rank: int
    low_rank: float
    difference: float | None
    coefficient: float | None


@dataclass(frozen=True)
class MapObservation:
    """A linear map of a layer, or that of all its experts.

    Attributes:
        cosine: mean over tokens of the cosine similarity of y and p.
        errors: by rank; of experts, over the tokens of all.
        spectrum: [i, singular value i of Y, of Y - b P with the middle rank's b], from 1, in units of ||Y||.
    """

    layer: int
    position: str
    cosine: float | None
    errors: tuple[RankErrors, ...]
    spectrum: tuple[tuple[float | None, ...], ...]


def default_ranks(hidden_size: int) -> list[int]:
    """h/8, h/4 and h/2."""
    return sorted({max(hidden_size // part, 1) for part in (8, 4, 2)})


def observe(
    source: SourceModel,
    rows: Tensor,
    ranks: Sequence[int],
    devices: Sequence[torch.device],
    batch_size: int = 4,
    progress: Callable[[int], None] = lambda layers: None,
) -> list[MapObservation]:
    """Every linear map of every layer of a model, and for comparison the stream behind it and its experts together.

    Args:
        rows: tokens of the text, [rows, s].
        ranks: at which errors are wanted, the spectrum of the difference at the middle one.
        devices: share the rows, and then the positions.
        progress: called with the layers that are done.

    Raises:
        DataError: a weight is not finite, or zero all over.
    """
    groups = maps_by_input(source.table.architecture, source.table.num_experts)
    of_experts = {one.name: one.position for group in groups for one in group if one.is_experts}
    together = (MIXTURE, STREAM) if of_experts else (STREAM,)
    positions = (*source.table.architecture.names, *of_experts, *together)

    def look(outputs: MapOutputs) -> MapObservation | _Expert:
        if outputs.position not in of_experts:
            return _observed(ranks, outputs)
        own, whole = outputs.difference.energies(0.0).cpu(), outputs.difference.norms[0]
        return _Expert(outputs.layer, of_experts[outputs.position], own, whole)

    found: dict[tuple[int, str], MapObservation | list[_Expert]] = {}
    for one in each_map(source, rows, positions, look, devices, batch_size, progress):
        if isinstance(one, MapObservation):
            found[one.layer, one.position] = one
        else:
            found.setdefault((one.layer, one.position), []).append(one)  # type: ignore[union-attr]
    return [_all_experts(ranks, one) if isinstance(one, list) else one for one in found.values()]


class _Expert(NamedTuple):
    """A map of one expert: squared singular values of Y, and ||Y||^2."""

    layer: int
    position: str
    energies: Tensor
    norm: float


def _all_experts(ranks: Sequence[int], parts: Sequence[_Expert]) -> MapObservation:
    """The same map of all experts of a layer, each of which has the rank."""
    own, whole = torch.stack([part.energies for part in parts]).sum(0), sum(part.norm for part in parts)
    errors = tuple(RankErrors(rank, _low_rank_error(own, whole, rank), None, None) for rank in ranks)
    return MapObservation(parts[0].layer, parts[0].position, None, errors, _spectrum(own, None, whole))


def _observed(ranks: Sequence[int], outputs: MapOutputs) -> MapObservation:
    difference, cosine = outputs.difference, outputs.cosine
    own = difference.energies(0.0)
    whole = difference.norms[0]
    errors, at_middle = [], None
    for rank in ranks:
        plain = _low_rank_error(own, whole, rank)
        if difference.pp is None:
            errors.append(RankErrors(rank, plain, None, None))
            continue
        b = difference.best_scale(rank)
        errors.append(RankErrors(rank, plain, _relative(difference.error(b, rank), whole), b))
        if rank == ranks[len(ranks) // 2]:
            at_middle = difference.energies(b)
    return MapObservation(outputs.layer, outputs.position, cosine, tuple(errors), _spectrum(own, at_middle, whole))


def _low_rank_error(energies: Tensor, whole: float, rank: int) -> float:
    return _relative(whole - float(energies[:rank].sum()), whole)


def _relative(squared: float, whole: float) -> float:
    return (max(squared, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def _spectrum(own: Tensor, other: Tensor | None, whole: float) -> tuple[tuple[float | None, ...], ...]:
    indices = np.unique(np.geomspace(1, len(own), POINTS).round().astype(int)).tolist()
    return tuple(
        (i, _relative(float(own[i - 1]), whole), None if other is None else _relative(float(other[i - 1]), whole))
        for i in indices
    )
