"""A study's results as a table and as plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_crnet.reporting.study import Row, by_variant, loss_of
from megatron_crnet.reporting.study_grid import Axis, Study
from megatron_crnet.utils.files import replacing
from megatron_crnet.utils.tables import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def column_axis(study: Study) -> Axis | None:
    """The axis along which losses are laid out: the first that is extended."""
    return next((axis for axis in study.axes if axis.extend is not None), None)


def study_table(study: Study, rows: Mapping[str, Row]) -> str:
    """A line per variant: parameters, the loss at each value of the extended axis, and the best.

    Losses are validation losses in nats per token, over several seeds mean and standard deviation.
    """
    axis = column_axis(study)
    values = [None] if axis is None else [*axis.values]
    header = ["variant", "parameters", *("loss" if axis is None else f"{axis.label} {value:g}" for value in values)]
    header += ["best"] if axis else []
    lines = []
    for name, found in by_variant(study, rows, axis).items():
        sizes = {f"{row['parameters'] / 1e6:.2f}M" for rows_of_value in found.values() for row in rows_of_value}
        cells = [_cell(found.get(value, [])) for value in values]
        if axis is not None:
            best = min(found, key=lambda value: loss_of(found[value]))
            cells.append(f"{_cell(found[best])} at {best:g}" if math.isfinite(loss_of(found[best])) else "-")
        lines.append([name, " or ".join(sorted(sizes)), *cells])
    return table(header, lines)


def _cell(rows: list[Row]) -> str:
    losses = [row["validation_loss"] for row in rows if row["status"] == "complete"]
    others = [row["status"] for row in rows if row["status"] != "complete"]
    text = f"{statistics.fmean(losses):.4f}" if losses else ""
    if len(losses) > 1:
        text += f" ± {statistics.stdev(losses):.4f}"
    return ", ".join([*([text] if text else []), *(f"{others.count(x)} {x}" for x in sorted({*others}))]) or "-"


def plot_study(study: Study, rows: Mapping[str, Row], picture: Path) -> None:
    """Validation loss over the extended axis, a line per variant; without such an axis a mark per variant."""
    axis = column_axis(study)
    figure, axes = _figure(study)
    lowest, highest = math.inf, -math.inf
    for index, (name, found) in enumerate(by_variant(study, rows, axis).items()):
        points = [(value, loss_of(of_value)) for value, of_value in sorted(found.items())]
        points = [(value, loss) for value, loss in points if math.isfinite(loss)]
        if not points:
            continue
        style: dict[str, Any] = {"marker": "osD^v*"[index % 6], "linestyle": ("-", "--", ":")[index // 10 % 3]}
        if axis is None:
            axes.plot([points[0][1]], [name], **style)
        else:
            axes.plot(*zip(*points, strict=True), label=name, **style)
        losses = [loss for _, loss in points]
        lowest, highest = min(lowest, *losses), max(highest, min(losses))
    if axis is None:
        axes.set(xlabel="validation loss (nats per token)")
    else:
        axes.set(xlabel=axis.name, ylabel="validation loss (nats per token)", xscale="log")
        if math.isfinite(lowest):
            # what is far from every best value would flatten the rest
            margin = max(highest - lowest, 0.05)
            axes.set_ylim(lowest - 0.2 * margin, min(axes.get_ylim()[1], highest + 1.5 * margin))
            axes.legend(fontsize="small")
    _save(figure, picture)


def plot_curves(study: Study, rows: Mapping[str, Row], picture: Path) -> None:
    """Validation loss over tokens, mean over the seeds, a line per variant at its best value of the extended axis.

    Nothing is drawn if no run validated more than once.
    """
    figure, axes = _figure(study)
    for name, found in by_variant(study, rows, column_axis(study)).items():
        complete = [row for row in found[min(found, key=lambda v: loss_of(found[v]))] if row["status"] == "complete"]
        curves = [dict(curve) for row in complete if len(curve := row.get("curve", [])) > 1]
        tokens = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        if tokens:
            axes.plot(tokens, [statistics.fmean(curve[n] for curve in curves) for n in tokens], label=name)
    if axes.lines:
        axes.set(xlabel="tokens", ylabel="validation loss (nats per token)")
        axes.legend(fontsize="small")
        _save(figure, picture)


def _figure(study: Study) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=study.path.stem)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, picture: Path) -> None:
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
