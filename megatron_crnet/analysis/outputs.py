"""Gram matrices of the outputs of every linear map of a model, beside those of the layer before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_crnet.analysis.difference import Difference
from megatron_crnet.analysis.source import SourceModel
from megatron_crnet.analysis.stream import MIXTURE, STREAM, Activations, Map, Sums

T = TypeVar("T")


@dataclass(frozen=True)
class MapOutputs:
    """The outputs of a linear map, without its bias, on all tokens, as sums.

    Attributes:
        position: `LayerMap.name`.
        difference: of Y and P, the outputs of the same map in the previous layer; without P in the first, and of an
            expert's.
        cosine: mean over tokens of the cosine similarity of y and p.
    """

    layer: int
    position: str
    difference: Difference
    cosine: float | None


def each_map(
    source: SourceModel,
    rows: Tensor,
    positions: Sequence[str],
    look: Callable[[MapOutputs], T],
    devices: Sequence[torch.device],
    batch_size: int = 4,
    progress: Callable[[int], None] = lambda layers: None,
) -> list[T]:
    """What `look` gives for every layer and each of these positions, in this order.

    Args:
        rows: tokens of the text, [rows, s].
        positions: linear maps, by `LayerMap.name`, `MIXTURE` and `STREAM`.
        devices: share the rows, and then the positions of a layer.
        progress: called with the layers that are done.

    Raises:
        DataError: a weight of the model is not finite, or zero all over.
    """
    stream = Activations(source.embed(rows), batch_size, devices, carries_mixture=MIXTURE in positions)
    before: Sums | None = None
    found: list[T] = []
    chained = (*source.table.architecture.names, MIXTURE, STREAM)
    with ThreadPoolExecutor(len(devices)) as pool:
        for layer in range(source.config.model.num_layers):
            sums = stream.advance(source.layer(layer), partial(collect_outputs, positions))
            jobs = {
                position: pool.submit(_look_at, look, layer, position, sums, before, devices[i % len(devices)])
                for i, position in enumerate(positions)
            }
            found += [jobs[position].result() for position in positions]
            before = Sums({key: product for key, product in sums.items() if key[0] == "yy" and key[1] in chained})
            progress(layer + 1)
    return found


def collect_outputs(positions: Sequence[str], sums: Sums, maps: dict[str, Map]) -> None:
    """Add Y^T Y, Y^T P, the cosine similarities of their rows and the number of these."""
    for position in positions:
        one = maps[position]
        sums.add_product(("yy", position), one.y, one.y)
        if one.previous is not None:
            sums.add_product(("yp", position), one.y, one.previous)
            cosines = F.cosine_similarity(one.y.double(), one.previous.double(), dim=-1)
            sums.add(("cosine", position), torch.stack((cosines.sum(), cosines.new_tensor(len(cosines)))))


def _look_at(
    look: Callable[[MapOutputs], T],
    layer: int,
    position: str,
    sums: Sums,
    before: Sums | None,
    device: torch.device,
) -> T:
    yy = sums["yy", position].to(device)
    if before is None or ("yp", position) not in sums:
        return look(MapOutputs(layer, position, Difference(yy, None, None, (float(yy.trace()), 0.0, 0.0)), None))
    yp, pp = sums["yp", position].to(device), before["yy", position].to(device)
    difference = Difference(yy, yp, pp, (float(yy.trace()), float(yp.trace()), float(pp.trace())))
    total, tokens = sums["cosine", position].tolist()
    return look(MapOutputs(layer, position, difference, total / tokens))
