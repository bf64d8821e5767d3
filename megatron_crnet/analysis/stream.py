"""Runs rows of tokens through a model layer by layer, and sums products of what its linear maps take and give.

In memory are one layer's weights, the sums of one layer, and what all rows carry from a layer to the next: the residual
stream and the outputs of the linear maps, in fp32. Of LLaMA-7B that is 5h + 2f + h = 46592 numbers or 182 KiB per
token. Nothing is written to disk.

Several devices share the rows. Shapes: b rows of a batch, s tokens of a row, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_crnet.analysis.maps import maps_by_input
from megatron_crnet.model.reference import MixtureOfExperts, ReferenceLayer

STREAM = "stream"
"""In place of a position: a layer as a whole, from the residual stream before it to the one after it."""
MIXTURE = "experts"
"""In place of a position: all experts of a layer together, what they add to the residual stream."""


@dataclass(frozen=True)
class Batch:
    """Rows between two layers.

    Attributes:
        hidden: the residual stream, [b, s, h].
        outputs: of the linear maps of the layer before, by position, and of its `MIXTURE`, [b, s, width] each; empty
            before the first.
    """

    hidden: Tensor
    outputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Map:
    """A linear map on a batch.

    Attributes:
        x, y: its inputs and outputs, [tokens, width] each; of an expert's, of the tokens that it is given.
        previous: the outputs of the same map in the layer before; None in the first, and of an expert's.
    """

    x: Tensor
    y: Tensor
    previous: Tensor | None


class Sums(dict[tuple[str, str], Tensor]):
    """Sums over tokens, in fp64, by what they are of and the name of the map."""

    def add_product(self, key: tuple[str, str], a: Tensor, b: Tensor) -> None:
        """Add a^T b, [m, n], of a [tokens, m] and b [tokens, n]."""
        wide = a.double()
        other = wide if b is a else b.double()
        if key not in self:
            self[key] = wide.new_zeros(a.shape[1], b.shape[1])
        self[key].addmm_(wide.T, other)

    def add(self, key: tuple[str, str], value: Tensor) -> None:
        """Add a number or a tensor."""
        self[key] = self[key] + value if key in self else value


Collect = Callable[[Sums, dict[str, Map]], None]
"""Adds what is wanted of a batch's maps, by `LayerMap.name`, to the sums of its device."""


def default_devices() -> list[torch.device]:
    """All GPUs, or the CPU."""
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]


class Activations:
    """What rows carry from layer to layer.

    Args:
        hidden: the residual stream before the first layer, [rows, s, h].
        batch_size: b.
        devices: the batches go to them in turn; sums are collected on the first.
        carries_mixture: whether the outputs of all experts together are kept for the next layer.
    """

    def __init__(
        self, hidden: Tensor, batch_size: int, devices: Sequence[torch.device], carries_mixture: bool = False
    ) -> None:
        self.devices, self.carries_mixture = list(devices), carries_mixture
        batches = enumerate(hidden.split(batch_size))
        self.batches = [Batch(part.to(self._device(i), copy=True)) for i, part in batches]

    def measure(self, layer: ReferenceLayer, collect: Collect) -> Sums:
        """Sums over the maps of a layer, after which the rows stand before it as they did."""
        return self._visit(layer, collect, advance=False)

    def advance(self, layer: ReferenceLayer, collect: Collect = lambda sums, maps: None) -> Sums:
        """The same, after which the rows stand behind the layer."""
        return self._visit(layer, collect, advance=True)

    def _device(self, batch: int) -> torch.device:
        return self.devices[batch % len(self.devices)]

    def _visit(self, layer: ReferenceLayer, collect: Collect, advance: bool) -> Sums:
        layers = [layer.to(self.devices[0]), *(deepcopy(layer).to(device) for device in self.devices[1:])]

        def on(number: int) -> Sums:
            sums = Sums()
            with torch.no_grad():  # counts per thread
                for i in range(number, len(self.batches), len(self.devices)):
                    maps, after = run_layer(layers[number], self.batches[i], self.carries_mixture)
                    collect(sums, maps)
                    if advance:
                        self.batches[i] = after
            return sums

        with ThreadPoolExecutor(len(self.devices)) as pool:
            first, *others = pool.map(on, range(len(self.devices)))
        for sums in others:
            for key, value in sums.items():
                first.add(key, value.to(self.devices[0]))
        return first


def run_layer(layer: ReferenceLayer, batch: Batch, carries_mixture: bool) -> tuple[dict[str, Map], Batch]:
    """A layer's linear maps on a batch, by name, its `MIXTURE`, the layer as `STREAM`, and the batch behind it."""
    before, maps = batch.outputs, dict[str, Map]()

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        previous = before[name].flatten(0, 1) if name in before else None
        return lambda _module, x, y: maps.update({name: Map(x[0].flatten(0, -2), y.flatten(0, -2), previous)})

    mixture = layer.mlp if isinstance(layer.mlp, MixtureOfExperts) else None
    groups = maps_by_input(layer.architecture, len(mixture.experts) if mixture is not None else 0)
    modules: dict[str, nn.Module] = {one.name: layer.get_submodule(one.module) for group in groups for one in group}
    modules |= {MIXTURE: mixture} if mixture is not None else {}
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(note(name)).remove)
        hidden, outputs = layer(batch.hidden, batch.outputs)
    if mixture is not None and carries_mixture:
        outputs[MIXTURE] = maps[MIXTURE].y.view_as(hidden)
    stream_in, stream_out = batch.hidden.flatten(0, 1), hidden.flatten(0, 1)
    return {**maps, STREAM: Map(stream_in, stream_out, stream_in)}, Batch(hidden, outputs)
