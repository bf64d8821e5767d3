"""The paper's observation on models (`analysis/observation.py`), as text and as a section of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from megatron_crnet.analysis.stream import MIXTURE, STREAM
from megatron_crnet.reporting.page import Section, Table
from megatron_crnet.reporting.pictures import Lines, Picture, Series
from megatron_crnet.reporting.records import numbered

Record = Mapping[str, Any]
ROUNDING = 1e-6
"""Relative error, of whose square fp64 knows nothing: a map is no wider than the rank, or its outputs are."""


def observation_text(record: Record) -> str:
    """A table over all models, and for the last of each name the ratio of the two errors by layer and position."""
    frames = [_errors(model) for model in record["models"]]
    tables = [_summary(frames), *_of_experts(frames)]
    tables += [_by_layer(frame) for frame in map(_errors, _last_of_each(record["models"])) if _is_chained(frame)]
    return "\n\n".join(table.markdown() for table in tables)


def observation_section(records: Sequence[Record]) -> Section:
    """Tables and pictures of all files of observations."""
    section = Section(
        "Layers and the layers before them",
        "Relative errors of a layer's outputs Y on given text: LR_r(Y), the best approximation of rank r, and "
        "b P + LR_r(Y - b P) with the best b, where P are the outputs of the same map in the previous layer. A ratio "
        "below 1 is what the previous outputs save; CR-Net's paper reports 0.4 to 0.97 at r = h/4. LR_r may be any "
        "matrix, also one that no X A B gives. The stream is the residual stream behind a layer, with the one before "
        "it as P: these two have much in common by construction. Experts are what those of a layer give together; "
        "their own maps have no P.",
    )
    models = _named_apart([model for record in records for model in record["models"]])
    if not models:
        return section
    frames = pd.concat([_errors(model) for model in models])
    section.tables += [_summary([frames]), *_of_experts([frames])]
    for _, found in frames.groupby("name", sort=False):
        section.pictures += _over_training(found)
    for model in _last_of_each(models):
        frame = _errors(model)
        if _is_chained(frame):
            section.tables.append(_by_layer(frame))
            section.pictures += [_ratio_by_layer(frame), *_spectra(model, frame)]
    return section


def _named_apart(models: Sequence[Record]) -> list[Record]:
    """Models of which no two have the same name and step: folders of several runs may have one name."""
    found: list[Record] = []
    for model in models:
        taken = {one["name"] for one in found if one["step"] == model["step"]}
        found.append({**model, "name": numbered(model["name"], taken)})
    return found


def _is_chained(frame: pd.DataFrame) -> bool:
    return not frame["ratio"].dropna().empty


def _last_of_each(models: Sequence[Record]) -> list[Record]:
    return [*{model["name"]: model for model in models}.values()]


def _errors(model: Record) -> pd.DataFrame:
    """A row per layer, position and rank. The nominal rank is the middle one of those below a map's own."""
    step = model["step"]
    label = model["name"] if step is None else f"{model['name']}, step {step}"
    shared = {"label": label, "name": model["name"], "step": step}
    rows = [
        {**shared, "layer": one["layer"], "position": one["position"], "cosine": one["cosine"], **errors}
        for one in model["maps"]
        for errors in one["errors"]
    ]
    frame = pd.DataFrame(rows)
    numbers = frame[["low_rank", "difference", "coefficient", "cosine"]].astype(float)
    ratio = (numbers["difference"] / numbers["low_rank"]).where(numbers["low_rank"] > ROUNDING)
    ranks = sorted(set(frame["rank"][ratio.notna()])) or sorted(model["ranks"])
    return frame.assign(**numbers, ratio=ratio, nominal=ranks[len(ranks) // 2])


def _summary(frames: Sequence[pd.DataFrame]) -> Table:
    rows, every = [], pd.concat(frames)
    positions = set(every["position"])
    for (label, rank), found in every.groupby(["label", "rank"], sort=False):
        alone = found[~_is_together(found)]
        chained = alone.dropna(subset="ratio")
        # a model of one layer has no outputs before
        plain = alone if alone["difference"].isna().all() else chained
        rows.append(
            {
                "model": label,
                "rank": f"{rank}",
                "LR_r(Y)": _shown(plain["low_rank"].mean(), 4),
                "with b P": _shown(chained["difference"].mean(), 4),
                "ratio": _shown(chained["ratio"].mean()),
                "least": _shown(chained["ratio"].min()),
                "most": _shown(chained["ratio"].max()),
                "b": _shown(chained["coefficient"].mean()),
                "cosine": _shown(chained["cosine"].mean()),
                **{f"ratio of {name}": _mean_ratio(found, name) for name in (STREAM, MIXTURE) if name in positions},
            }
        )
    return Table(rows, title="Relative errors, means over layers and positions with previous outputs")


def _mean_ratio(frame: pd.DataFrame, position: str) -> str:
    return _shown(frame.loc[frame["position"] == position, "ratio"].mean())


def _shown(value: float, digits: int = 3) -> str:
    """A mean, `-` where there is nothing to take it of."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _of_experts(frames: Sequence[pd.DataFrame]) -> list[Table]:
    """LR_r(Y) of the maps of experts, which have no outputs of the layer before."""
    frame = pd.concat(frames)
    has_experts = frame["label"].isin(frame.loc[frame["position"] == MIXTURE, "label"])
    is_chained = frame.groupby(["label", "position"], sort=False)["difference"].transform("count") > 0
    alone = frame[has_experts & ~is_chained & ~_is_together(frame) & (frame["layer"].max() > 0)]
    if alone.empty:
        return []
    means = alone.pivot_table(index=["label", "rank"], columns="position", values="low_rank", sort=False)
    cells = means.map("{:.4f}".format).rename_axis(columns=None).reset_index().rename(columns={"label": "model"})
    return [Table(cells, title="LR_r(Y) of the maps of experts on the tokens that each is given, means over layers")]


def _is_together(frame: pd.DataFrame) -> pd.Series:
    """Which rows are of the residual stream or of a layer's experts together, not of a linear map."""
    return frame["position"].isin([STREAM, MIXTURE])


def _by_layer(frame: pd.DataFrame) -> Table:
    nominal = frame[frame["rank"] == frame["nominal"]].dropna(subset="ratio")
    cells = nominal.pivot(index="layer", columns="position", values="ratio")[[*dict.fromkeys(nominal["position"])]]
    title = f"{frame['label'].iloc[0]}: ratio of the errors at rank {frame['nominal'].iloc[0]}"
    return Table(cells.map("{:.3f}".format).rename_axis(columns=None).reset_index(), text=0, title=title)


def _ratio_by_layer(frame: pd.DataFrame) -> Picture:
    nominal = frame[frame["rank"] == frame["nominal"]].dropna(subset="ratio")
    series = [
        Series(str(position), [*zip(found["layer"], found["ratio"], strict=True)], i)
        for i, (position, found) in enumerate(nominal.groupby("position", sort=False))
    ]
    caption = "Below 1 the outputs of the previous layer help."
    title = f"Ratio of errors at rank {frame['nominal'].iloc[0]}, {frame['label'].iloc[0]}"
    return Lines(title, caption, "layer", "error with b P / without", series)


def _over_training(frame: pd.DataFrame) -> list[Picture]:
    known = frame[frame["rank"] == frame["nominal"]].dropna(subset=["ratio", "step"])
    if known["step"].nunique() < 2:
        return []
    name, caption = frame["name"].iloc[0], "Means over layers."
    pictures: list[Picture] = []
    for column, y in (("ratio", "error with b P / without"), ("cosine", "cosine of Y and P")):
        series = [
            Series(str(position), [*found.groupby("step")[column].mean().items()], i)
            for i, (position, found) in enumerate(known.groupby("position", sort=False))
        ]
        pictures.append(Lines(f"{y.capitalize()} over training, {name}", caption, "step", y, series))
    return pictures


def _spectra(model: Record, frame: pd.DataFrame) -> list[Picture]:
    """Of the middle layer, the positions with the least and the largest ratio."""
    middle = max(frame["layer"].max() // 2, 1)
    found = frame[(frame["layer"] == middle) & (frame["rank"] == frame["nominal"]) & ~_is_together(frame)]
    found = found.dropna(subset="ratio")
    if found.empty:
        return []
    chosen = [found.loc[index(found["ratio"]), "position"] for index in (pd.Series.idxmin, pd.Series.idxmax)]
    series = []
    for i, position in enumerate(dict.fromkeys(chosen)):
        (one,) = (m for m in model["maps"] if (m["layer"], m["position"]) == (middle, position))
        for j, name in enumerate((f"{position}: Y", f"{position}: Y - b P"), 1):
            points = [(values[0], values[j]) for values in one["spectrum"] if values[j]]
            series.append(Series(name, points, 2 * i + j - 1, "unmarked"))
    caption = "Of the maps with the least and the largest ratio in this layer; in units of ||Y||."
    return [Lines(f"Singular values, {model['name']}, layer {middle}", caption, "index", "size", series, True)]
