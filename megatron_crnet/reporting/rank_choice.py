"""Ranks chosen from spectra (`analysis/ranks.py`): the YAML that a configuration takes, a table and pictures."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from megatron_crnet.analysis.ranks import Ranks, Spectrum
from megatron_crnet.config.model_size import total_parameters
from megatron_crnet.config.schema import ModelConfig
from megatron_crnet.reporting.page import Section, Table
from megatron_crnet.reporting.pictures import Lines, Series

CURVES = 4
"""Of a picture of spectra: maps in equal steps from the least to the most that is left at the uniform rank."""


def rank_yaml(model: ModelConfig, command: str) -> str:
    """The model section with variant, full-rank layers and ranks, for a further --config."""
    names = ("variant", "full_rank_layers", *(("full_rank_experts",) if model.num_experts else ()), "rank")
    values = {name: getattr(model, name) for name in names}
    dumped = yaml.safe_dump({"model": values}, sort_keys=False, default_flow_style=None, width=110)
    return f"# {command}\n# {total_parameters(model):,} parameters\n{dumped}"


def rank_section(model: ModelConfig, spectra: Sequence[Spectrum], ranks: Ranks, uniform: int, capped: bool) -> Section:
    """The choice, and what it keeps beside one rank for all maps.

    Args:
        model: with the chosen ranks.
        uniform: the largest rank for all maps within the same budget.
        capped: whether the budget allows more than ranks at which maps are smaller than full-rank ones.
    """
    before = [one.error(uniform) for one in spectra]
    after = [one.error(ranks[one.layer, one.position]) for one in spectra]
    mean = [(sum(error**2 for error in errors) / len(errors)) ** 0.5 for errors in (before, after)]
    section = Section(
        "Ranks by spectra",
        "Ranks go where the singular values of Y - s P are large for what a rank costs; Y are the outputs of a map, P "
        "those of the same map in the previous layer (none in low_rank, nor of experts), both on calibration text.",
    )
    positions = [*dict.fromkeys(one.position for one in spectra)]
    layers = [*dict.fromkeys(one.layer for one in spectra)]
    section.tables.append(
        Table(
            [{"layer": str(layer), **{p: str(ranks[layer, p]) for p in positions}} for layer in layers],
            text=0,
            title="Ranks",
        )
    )
    section.notes = [
        f"{total_parameters(model):,} parameters; relative error of the outputs, root mean square over maps: "
        f"{mean[1]:.4f}, with rank {uniform} everywhere {mean[0]:.4f}"
    ]
    if capped:
        section.notes.append(
            "the budget allows more, but every map has the largest rank at which it is smaller than a full-rank one: "
            "take a smaller budget, or variant full_rank"
        )
    section.pictures = [
        Lines(
            "Ranks by layer",
            f"With rank {uniform} everywhere the model has at most as many parameters or operations as the budget.",
            "layer",
            "rank",
            [Series(p, [(layer, ranks[layer, p]) for layer in layers], i) for i, p in enumerate(positions)],
        ),
        _spectra_picture(spectra, ranks, uniform),
    ]
    return section


def _spectra_picture(spectra: Sequence[Spectrum], ranks: Ranks, uniform: int) -> Lines:
    by_rest = sorted(spectra, key=lambda one: one.error(uniform))
    count = min(CURVES, len(by_rest))
    shown = [by_rest[round(i * (len(by_rest) - 1) / max(count - 1, 1))] for i in range(count)]
    series = []
    for i, one in enumerate(shown):
        name = f"layer {one.layer}, {one.position}"
        points = [(j, energy**0.5) for j, energy in enumerate(one.energies, 1) if energy > 0]
        rank = ranks[one.layer, one.position]
        series.append(Series(name, points, i, "unmarked"))
        series.append(Series(f"{name}: rank {rank}", points[rank - 1 : rank], i, "marks"))
    caption = "In units of ||Y||, from the map with the least left at the uniform rank to that with most."
    return Lines("Singular values and chosen ranks", caption, "index", "size", series, logarithmic=True)
