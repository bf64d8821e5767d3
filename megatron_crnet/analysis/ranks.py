"""Chooses ranks under a budget from the spectra of Y_l - s Y_(l-1).

A rank r of a map with h_in inputs and h_out outputs costs r (h_in + h_out) parameters and keeps the r largest squared
singular values of Y_l - s Y_(l-1), in units of ||Y_l||^2, so that every map weighs the same whatever the size of its
outputs. The ranks that keep most within a budget are a knapsack of steps of `multiple` ranks. The steps of one map keep
less and less, so taking the step that keeps most per parameter, again and again, gives the best ranks for every budget
that it meets exactly; for those in between it loses less than the one step that did not fit keeps.

s is the best one at the uniform rank of the same budget.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_crnet.analysis.from_dense import refuse_experts
from megatron_crnet.analysis.outputs import MapOutputs, each_map
from megatron_crnet.analysis.source import SourceModel
from megatron_crnet.config.model_size import flops_per_token, total_parameters
from megatron_crnet.config.positions import position_table
from megatron_crnet.config.schema import ModelConfig
from megatron_crnet.utils.errors import require

MULTIPLES = (64, 32, 16, 8)
"""Of ranks, that matrix units like."""
SMALLEST = 1e-300
"""In place of the norm of outputs that are all 0."""
Ranks = dict[tuple[int, str], int]
"""By layer and position; without full-rank layers."""


@dataclass(frozen=True)
class Spectrum:
    """What each further rank of a map keeps.

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
    """

    limit: float
    fixed: float
    factor: float
    unit: str

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
        ConfigError: the model has experts.
    """
    table = position_table(target)
    refuse_experts(table)

    def look(outputs: MapOutputs) -> Spectrum | None:
        if table.is_full_rank(outputs.layer):
            return None
        chained, difference = table.has_previous(outputs.layer), outputs.difference
        s, whole = difference.best_scale(rank) if chained else 0.0, max(difference.norms[0], SMALLEST)
        energies = (difference.energies(s) / whole).tolist()
        scale = s if chained else None
        return Spectrum(outputs.layer, outputs.position, scale, energies, difference.total(s) / whole)

    found = each_map(source, rows, table.architecture.names, look, devices, batch_size, progress)
    return [one for one in found if one is not None]


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
    return Budget(operations, flops_per_token(one, seq_length) - 6.0 * _low_rank_parameters(one), 6.0, "operations")


def uniform_rank(model: ModelConfig, budget: Budget) -> int:
    """The largest rank that all low-rank maps can have; at least 1."""
    return max(int(budget.parameters // max(_low_rank_parameters(replace(model, rank=1)), 1)), 1)


def choose_ranks(model: ModelConfig, spectra: Sequence[Spectrum], budget: Budget, multiple: int) -> Ranks:
    """The ranks that keep most within a budget.

    Args:
        model: its low-rank layers are those of `spectra`.
        multiple: ranks are multiples of it, but for maps whose largest useful rank is smaller.

    Raises:
        ConfigError: the budget is below the cost of the smallest ranks.
    """
    left = check_budget(model, budget, multiple)
    costs, largest, ranks = _smallest(model, multiple)
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


def check_budget(model: ModelConfig, budget: Budget, multiple: int) -> float:
    """What the smallest ranks leave of a budget, in parameters.

    Raises:
        ConfigError: it is below their cost, or no layer is of low rank.
    """
    costs, _, ranks = _smallest(model, multiple)
    require(bool(costs), "every layer is a full-rank one, so that there is no rank to choose: leave layers of low rank")
    left = budget.parameters - sum(costs[key] * rank for key, rank in ranks.items())
    require(
        left >= 0,
        f"the budget is {budget.limit:,.0f} {budget.unit}, but with ranks of {multiple} the model has "
        f"{budget.limit - budget.factor * left:,.0f}: raise it, or lower --multiple",
    )
    return left


def _smallest(model: ModelConfig, multiple: int) -> tuple[Ranks, Ranks, Ranks]:
    """By map of low rank: parameters of a rank, the largest useful rank, the smallest."""
    table = position_table(model)
    keys = [(i, p) for i in range(model.num_layers) if not table.is_full_rank(i) for p in table.shapes]
    largest = {(i, p): largest_rank(*table.shapes[p], multiple) for i, p in keys}
    return {(i, p): sum(table.shapes[p]) for i, p in keys}, largest, {k: min(multiple, largest[k]) for k in keys}


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


def _low_rank_parameters(model: ModelConfig) -> int:
    table = position_table(model)
    return sum(
        rank * sum(table.shapes[position])
        for layer, ranks in enumerate(table.ranks)
        if not table.is_full_rank(layer)
        for position, rank in ranks.items()
    )
