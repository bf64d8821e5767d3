"""Chooses ranks under a budget from the spectra of Y_l - s Y_(l-1).

A rank r of a map with h_in inputs and h_out outputs costs r (h_in + h_out) parameters and keeps the r largest squared
singular values of Y_l - s Y_(l-1), in units of ||Y_l||^2, so that every map weighs the same whatever the size of its
outputs. The ranks that keep most within a budget are a knapsack of steps of `multiple` ranks. The steps of one map keep
less and less, so taking the step that keeps most per parameter, again and again, gives the best ranks for every budget
that it meets exactly; for those in between it loses less than the one step that did not fit keeps.

s is the best one at the uniform rank of the same budget.

The experts of a layer have one rank for each of gate, up and down. It costs as much as that of one expert times the
experts, or in operations times those that a token passes, and it keeps what each of them keeps of its outputs on the
tokens that it is given, in units of the sum of their ||Y||^2: all experts of a layer together are one map here.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_crnet.analysis.difference import SMALLEST
from megatron_crnet.analysis.maps import maps_by_input
from megatron_crnet.analysis.outputs import MapOutputs, each_map
from megatron_crnet.analysis.source import SourceModel
from megatron_crnet.config.model_size import flops_per_token, map_counts, total_parameters
from megatron_crnet.config.positions import position_table
from megatron_crnet.config.schema import ModelConfig
from megatron_crnet.utils.errors import require

MULTIPLES = (64, 32, 16, 8)
"""Of ranks, that matrix units like."""
Ranks = dict[tuple[int, str], int]
"""By layer and position; without full-rank layers."""


@dataclass(frozen=True)
class Spectrum:
    """What each further rank of a map keeps, or of the maps of all experts.

    Attributes:
        scale: s; None where there is no previous output.
        energies: squared singular values of Y - s P over ||Y||^2, the largest first.
        total: ||Y - s P||^2 / ||Y||^2.
    """

    layer: int
    position: str
    scale: float | None
    energies: Sequence[float]
    total: float

    def error(self, rank: int) -> float:
        """Relative error of the outputs at this rank."""
        return max(self.total - sum(self.energies[:rank]), 0.0) ** 0.5


@dataclass(frozen=True)
class Budget:
    """What the low-rank maps may cost.

    Attributes:
        limit: of the whole model.
        fixed: cost of all the rest.
        factor: cost of a parameter of a low-rank map: 1, or 6 operations per token.
        unit: how it is called.
        is_active: of experts, only those that a token passes cost anything.
    """

    limit: float
    fixed: float
    factor: float
    unit: str
    is_active: bool = False

    @property
    def parameters(self) -> float:
        """Parameters that the low-rank maps may have."""
        return (self.limit - self.fixed) / self.factor


def spectra_of(
    source: SourceModel,
    target: ModelConfig,
    rows: Tensor,
    rank: int,
    devices: Sequence[torch.device],
    batch_size: int = 4,
    progress: Callable[[int], None] = lambda layers: None,
) -> list[Spectrum]:
    """The spectra of all maps that are of low rank in `target`, with the best s at `rank`.

    Args:
        rows: tokens of the text, [rows, s].

    Raises:
        DataError: a weight of the model is not finite, or zero all over.
    """
    table = position_table(target)
    factored = {position for layer in range(target.num_layers) for position in table.factored(layer)}
    groups = maps_by_input(table.architecture, table.num_experts)
    maps = [one for group in groups for one in group if one.position in factored]

    def look(outputs: MapOutputs) -> _Energies | None:
        if table.is_full_rank(outputs.layer):
            return None
        chained, difference = table.has_previous(outputs.layer), outputs.difference
        s = difference.best_scale(rank) if chained and difference.pp is not None else None
        energies = difference.energies(s or 0.0).cpu()
        return _Energies(s, energies, difference.total(s or 0.0), difference.norms[0])

    looked = each_map(source, rows, [one.name for one in maps], look, devices, batch_size, progress)
    found: dict[tuple[int, str], list[_Energies]] = {}
    for (layer, one), energies in zip(product(range(target.num_layers), maps), looked, strict=True):
        if energies is not None:
            found.setdefault((layer, one.position), []).append(energies)
    return [_together(*key, parts) for key, parts in found.items()]


class _Energies(NamedTuple):
    """Of one map: s, squared singular values of Y - s P, ||Y - s P||^2 and ||Y||^2."""

    scale: float | None
    energies: Tensor
    total: float
    norm: float


def _together(layer: int, position: str, parts: Sequence[_Energies]) -> Spectrum:
    """A map, or the same map of all experts, each of which has the rank."""
    whole = max(sum(one.norm for one in parts), SMALLEST)
    energies = (torch.stack([one.energies for one in parts]).sum(0) / whole).tolist()
    return Spectrum(layer, position, parts[0].scale, energies, sum(one.total for one in parts) / whole)


def rank_multiple(hidden_size: int) -> int:
    """The multiple that ranks of a model are rounded to: at most h/16."""
    return next((multiple for multiple in MULTIPLES if 16 * multiple <= hidden_size), 1)


def parameter_budget(model: ModelConfig, parameters: float) -> Budget:
    """So many parameters of the whole model."""
    one = replace(model, rank=1)
    return Budget(parameters, total_parameters(one) - _low_rank_parameters(one), 1.0, "parameters")


def operation_budget(model: ModelConfig, operations: float, seq_length: int) -> Budget:
    """So many floating-point operations per token, forward and backward, as `flops_per_token` counts them."""
    one = replace(model, rank=1)
    fixed = flops_per_token(one, seq_length) - 6.0 * _low_rank_parameters(one, active=True)
    return Budget(operations, fixed, 6.0, "operations", is_active=True)


def uniform_rank(model: ModelConfig, budget: Budget) -> int:
    """The largest rank that all low-rank maps can have within a budget; at least 1."""
    each = _low_rank_parameters(replace(model, rank=1), active=budget.is_active)
    most = min(min(shape) for shape in position_table(replace(model, rank=1)).shapes.values())
    return max(int(min(budget.parameters // max(each, 1), most)), 1)


def choose_ranks(model: ModelConfig, spectra: Sequence[Spectrum], budget: Budget, multiple: int) -> Ranks:
    """The ranks that keep most within a budget.

    Args:
        model: its low-rank layers are those of `spectra`.
        multiple: ranks are multiples of it, but for maps whose largest useful rank is smaller.

    Raises:
        ConfigError: the budget is below the cost of the smallest ranks.
    """
    left = check_budget(model, budget, multiple)
    costs, largest, ranks = _smallest(model, multiple, budget)
    by_map = {(one.layer, one.position): one for one in spectra}

    def step(key: tuple[int, str]) -> tuple[float, tuple[int, str]]:
        kept = sum(by_map[key].energies[ranks[key] : ranks[key] + multiple])
        return -kept / (multiple * costs[key]), key

    waiting = [step(key) for key in costs]
    heapq.heapify(waiting)
    while waiting:
        _, key = heapq.heappop(waiting)
        cost = multiple * costs[key]
        if cost <= left and ranks[key] + multiple <= largest[key]:
            left -= cost
            ranks[key] += multiple
            heapq.heappush(waiting, step(key))
    return ranks


def has_largest_ranks(model: ModelConfig, ranks: Ranks, budget: Budget, multiple: int) -> bool:
    """Whether no rank can grow, and yet a budget is not used up."""
    costs, largest, smallest = _smallest(model, multiple, budget)
    left = check_budget(model, budget, multiple) - sum(costs[key] * (ranks[key] - smallest[key]) for key in costs)
    return left > max(costs.values()) * multiple and all(ranks[key] + multiple > largest[key] for key in costs)


def check_budget(model: ModelConfig, budget: Budget, multiple: int) -> float:
    """What the smallest ranks leave of a budget, in parameters.

    Raises:
        ConfigError: it is below their cost, or no layer is of low rank.
    """
    costs, _, ranks = _smallest(model, multiple, budget)
    require(bool(costs), "every layer is a full-rank one, so that there is no rank to choose: leave layers of low rank")
    left = budget.parameters - sum(costs[key] * rank for key, rank in ranks.items())
    require(
        left >= 0,
        f"the budget is {budget.limit:,.0f} {budget.unit}, but with the smallest ranks, of {max(ranks.values())} at "
        f"most, the model has {budget.limit - budget.factor * left:,.0f}: raise it, or lower --multiple",
    )
    return left


def _smallest(model: ModelConfig, multiple: int, budget: Budget) -> tuple[Ranks, Ranks, Ranks]:
    """By map of low rank: parameters of a rank, the largest useful rank, the smallest."""
    table = position_table(model)
    count = table.uses if budget.is_active else table.copies
    keys = [(i, p) for i in range(model.num_layers) for p in table.factored(i)]
    largest = {(i, p): largest_rank(*table.shapes[p], multiple) for i, p in keys}
    return (
        {(i, p): count(p) * sum(table.shapes[p]) for i, p in keys},
        largest,
        {k: min(multiple, largest[k]) for k in keys},
    )


def largest_rank(h_in: int, h_out: int, multiple: int) -> int:
    """The largest multiple at which a low-rank map has fewer parameters than a full one; below it, any such rank."""
    most = max((h_in * h_out - 1) // (h_in + h_out), 1)
    return most // multiple * multiple or most


def rank_setting(ranks: Mapping[tuple[int, str], int], num_layers: int) -> dict[str, int | list[int]]:
    """`model.rank`: per position a rank for each layer, in full-rank layers that of another one."""
    positions = dict.fromkeys(position for _, position in ranks)
    found: dict[str, int | list[int]] = {}
    for position in positions:
        own = {layer: rank for (layer, at), rank in ranks.items() if at == position}
        found[position] = [own.get(layer, min(own.values())) for layer in range(num_layers)]
    return found


def _low_rank_parameters(model: ModelConfig, active: bool = False) -> int:
    table = position_table(model)
    return sum(map_counts(table, layer, active=active).factors for layer in range(model.num_layers))
