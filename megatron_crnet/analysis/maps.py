"""The linear maps of a layer, one by one: those that are chained, and those of each expert."""

from __future__ import annotations

from typing import NamedTuple

from megatron_crnet.config.architectures import Architecture


class LayerMap(NamedTuple):
    """A linear map of a layer.

    Attributes:
        name: its position; of an expert's, with the number of the expert.
        position: of which all experts of a layer have one.
        module: in exports, within a layer.
    """

    name: str
    position: str
    module: str

    @property
    def is_experts(self) -> bool:
        """Whether it sees only tokens that a router gives it, and no chain passes through it."""
        return self.name != self.position


def maps_by_input(architecture: Architecture, num_experts: int) -> list[tuple[LayerMap, ...]]:
    """All maps of a layer, those that share an input together."""
    found = [tuple(LayerMap(p.name, p.name, p.module) for p in group.positions) for group in architecture.groups]
    experts = architecture.experts
    if experts is None:
        return found
    return found + [
        tuple(LayerMap(f"{p.name} {number}", p.name, f"{experts.module}.{number}.{p.module}") for p in group.positions)
        for number in range(num_experts)
        for group in experts.groups
    ]
