"""The paper's observation on a model: are a layer's outputs the previous layer's and a low-rank difference?

For outputs Y of a linear map and P of the same map in the previous layer, both [N tokens, m], relative errors of

    LR_r(Y)                     the plain low-rank approximation, and
    b P + LR_r(Y - b P)         with the best b (`difference.py`),

where LR_r is the best approximation of rank r. Their ratio is what CR-Net (arXiv 2509.18993) is built on: 0.4 to 0.97
there, at r = h/4. LR_r may be any matrix of N rows; that a layer's X A B can reach it is not said (`fit.py` says it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_crnet.analysis.difference import Difference
from megatron_crnet.analysis.source import SourceModel
from megatron_crnet.analysis.stream import Activations, Map, Sums
from megatron_crnet.checkpoint.weight_files import EMBEDDING

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
    """A linear map of a layer.

    Attributes:
        cosine: mean over tokens of the cosine similarity of y and p.
        errors: by rank.
        spectrum: [i, singular value i of Y, of Y - b P at `spectrum_rank`'s b], from 1, in units of ||Y||.
    """

    layer: int
    position: str
    cosine: float | None
    errors: tuple[RankErrors, ...]
    spectrum: tuple[tuple[float | None, ...], ...]


def default_ranks(hidden_size: int) -> list[int]:
    """h/8, h/4 and h/2."""
    return sorted({max(hidden_size // part, 1) for part in (8, 4, 2)})


def output_differences(
    sums: Sums, before: Sums | None, positions: Sequence[str], device: torch.device
) -> dict[str, Difference]:
    """The differences of outputs of a layer, by position.

    Args:
        sums: of `collect_outputs` in this layer.
        before: the same of the layer before; None in the first.
    """
    found = {}
    for position in positions:
        yy = sums["yy", position].to(device)
        if before is None:
            found[position] = Difference(yy, None, None, (float(yy.trace()), 0.0, 0.0))
            continue
        yp, pp = sums["yp", position].to(device), before["yy", position].to(device)
        found[position] = Difference(yy, yp, pp, (float(yy.trace()), float(yp.trace()), float(pp.trace())))
    return found


def collect_outputs(sums: Sums, maps: dict[str, Map]) -> None:
    """Gram matrices of the outputs, products with those of the layer before, and their cosine similarities."""
    for position, one in maps.items():
        sums.add_product(("yy", position), one.y, one.y)
        if one.previous is not None:
            sums.add_product(("yp", position), one.y, one.previous)
            cosines = F.cosine_similarity(one.y.double(), one.previous.double(), dim=-1)
            sums.add(("cosine", position), cosines.mean() * len(cosines))


def observe(
    source: SourceModel,
    rows: Tensor,
    ranks: Sequence[int],
    devices: Sequence[torch.device],
    batch_size: int = 4,
    progress: Callable[[int], None] = lambda layers: None,
) -> list[MapObservation]:
    """Every linear map of every layer of a model.

    Args:
        rows: tokens of the text, [rows, s].
        ranks: at which errors are wanted, the spectrum of the difference at the middle one.
        devices: share the rows, and then the positions.
        progress: called with the layers that are done.

    Raises:
        DataError: a weight is not finite, or zero all over.
    """
    positions = source.table.architecture.names
    stream = Activations(source.read(EMBEDDING)[""], rows, batch_size, devices)
    before: Sums | None = None
    found: list[MapObservation] = []
    for layer in range(source.config.model.num_layers):
        sums = stream.advance(source.layer(layer), collect_outputs)

        def on_device(number: int, sums: Sums = sums, before: Sums | None = before, layer: int = layer) -> Any:
            own = positions[number :: len(devices)]
            return [
                (position, _observed(layer, position, difference, ranks, _cosine(sums, position, rows.numel())))
                for position, difference in output_differences(sums, before, own, devices[number]).items()
            ]

        with ThreadPoolExecutor(len(devices)) as pool:
            by_position = dict(pair for part in pool.map(on_device, range(len(devices))) for pair in part)
        found += [by_position[position] for position in positions]
        before = sums
        progress(layer + 1)
    return found


def _cosine(sums: Sums, position: str, tokens: int) -> float | None:
    total = sums.get(("cosine", position))
    return None if total is None else float(total) / tokens


def _observed(
    layer: int, position: str, outputs: Difference, ranks: Sequence[int], cosine: float | None
) -> MapObservation:
    own = outputs.energies(0.0)
    whole = outputs.norms[0]
    errors, at_middle = [], None
    for rank in ranks:
        plain = _relative(whole - float(own[:rank].sum()), whole)
        if outputs.pp is None:
            errors.append(RankErrors(rank, plain, None, None))
            continue
        b = outputs.best_scale(rank)
        errors.append(RankErrors(rank, plain, _relative(outputs.error(b, rank), whole), b))
        if rank == ranks[len(ranks) // 2]:
            at_middle = outputs.energies(b)
    return MapObservation(layer, position, cosine, tuple(errors), _spectrum(own, at_middle, whole))


def _relative(squared: float, whole: float) -> float:
    return (max(squared, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def _spectrum(own: Tensor, other: Tensor | None, whole: float) -> tuple[tuple[float | None, ...], ...]:
    indices = np.unique(np.geomspace(1, len(own), POINTS).round().astype(int)).tolist()
    return tuple(
        (i, _relative(float(own[i - 1]), whole), None if other is None else _relative(float(other[i - 1]), whole))
        for i in indices
    )
