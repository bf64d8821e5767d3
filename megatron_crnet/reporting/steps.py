"""The section that compares one step as it was estimated, simulated and measured.

Figures belong together where their files name the same step (`reporting/step_identity.py`). All are of one rank: a
benchmark holds those of every rank, an estimate those of every pipeline stage, a simulation those of its rank.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from megatron_crnet.reporting.inputs import ESTIMATED, MEASURED, SIMULATED, ReportInputs
from megatron_crnet.reporting.page import Section, Table
from megatron_crnet.reporting.pictures import Bars

MIB, GIB = 2.0**20, 2.0**30
PARTS = {
    "weights": "weights",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "activations": "activations, buffers and temporary",
}
"""Columns of memory, and how they are called."""
COLUMNS = [*PARTS, "name", "way", "source", "first", "last", "step", "operations", "traffic"]
COLUMNS += ["seconds", "tokens_per_s", "device"]
Unit = tuple[str, float]


def unit_of(values: Any, small: Unit = ("MiB", MIB), large: Unit = ("GiB", GIB)) -> Unit:
    """The larger unit where a value of the Series or DataFrame has ten of it."""
    return large if (values >= 10 * large[1]).to_numpy().any() else small


def bars_of(title: str, caption: str, sizes: pd.DataFrame) -> Bars:
    """Bars of bytes, in the unit that suits the largest."""
    unit, size = unit_of(sizes.sum(axis=1))
    return Bars(title, caption, unit, sizes / size)


def steps_section(inputs: ReportInputs) -> Section:
    """A table and a picture for each rank's step that was found in at least two ways."""
    section = Section(
        "Estimated, simulated, measured",
        "One step by formulas (crnet estimate), by the real code on tensors without memory (crnet simulate) and in "
        "real steps (crnet benchmark, runs). Memory, operations and bytes are those of one rank: the one that was "
        "simulated, or else the fullest. Operations are matrix products and attention without its mask, recomputation "
        "included. In brackets is the difference from the first measured figure, or where nothing was measured from "
        "the simulated one; a time is compared only where the estimate is for the device that was measured.",
    )
    order = (ESTIMATED, SIMULATED, MEASURED).index
    frame = pd.DataFrame(sorted(inputs.profiles, key=lambda row: order(row["way"])), columns=COLUMNS)
    if nameless := [name for name, rows in frame.groupby("name", sort=False) if rows["step"].isna().all()]:
        inputs.problems.append(f"made before files named their step, so in no pair: {', '.join(nameless)}")
    known = frame.dropna(subset="step")
    groups = [rows for _, rows in known.groupby(known["step"].map(lambda step: step["fingerprint"]), sort=False)]
    for rows in sorted(groups, key=lambda rows: MEASURED not in {*rows["way"]}):
        line = rows["step"].iloc[0]["line"]
        found = [(rank, rows[(rows["first"] <= rank) & (rank < rows["last"])]) for rank in _ranks(rows)]
        found = [(rank, sources) for rank, sources in found if sources["way"].nunique() > 1]
        for rank, sources in found:
            section.tables.append(_table(f"{line}; rank {rank}", sources))
            section.pictures += _picture(line, rank, sources)
        alone = rows[rows["way"] != MEASURED]
        if not found and len(alone):
            names = dict.fromkeys(f"{row.name} ({row.way})" for row in alone.itertuples(index=False, name="Profile"))
            inputs.problems.append(f"nothing to compare with {', '.join(names)}: {line}")
    return section


def _ranks(rows: pd.DataFrame) -> list[int]:
    """Those that were simulated, else the first of the stage that is estimated to be fullest, else the first."""
    known = rows[rows["first"] < rows["last"]]
    if simulated := sorted({*known[known["way"] == SIMULATED]["first"]}):
        return simulated
    estimated = known[known["way"] == ESTIMATED]
    return [0] if estimated.empty else [int(estimated.loc[estimated[[*PARTS]].sum(axis=1).idxmax(), "first"])]


def _table(title: str, sources: pd.DataFrame) -> Table:
    known = sources["traffic"].dropna()
    # by kind and group, named `GROUP kind`; added up over kinds, and missing where it is unknown
    volumes = pd.DataFrame([*known], index=known.index, dtype=float).T
    volumes = volumes.groupby(lambda name: name.rpartition(" ")[0]).sum().T.reindex(sources.index)
    peaks, operations = sources[[*PARTS]].sum(axis=1, skipna=False), sources["operations"]
    memory, flop, volume = unit_of(peaks), unit_of(operations, ("GFLOP", 1e9), ("TFLOP", 1e12)), unit_of(volumes)
    table = pd.DataFrame({"source": sources["way"] + ": " + sources["source"]})
    table[f"peak memory, {memory[0]}"] = _beside(sources, peaks, memory[1])
    table[f"operations, {flop[0]}"] = _beside(sources, operations, flop[1])
    for group, sizes in volumes.items():
        table[f"{group}, {volume[0]}"] = _beside(sources, sizes, volume[1])
    table["ms/step"] = _beside(sources, sources["seconds"], 1e-3, same_device=True)
    table["tokens/s"] = _beside(sources, sources["tokens_per_s"], 1.0, same_device=True)
    return Table(table, title=title)


def _beside(sources: pd.DataFrame, values: pd.Series, unit: float, same_device: bool = False) -> list[str]:
    """Each value beside the first measured one, or else simulated; times only where the device is the same."""
    known = sources[values.notna() & (sources["way"].isin([MEASURED] if same_device else [MEASURED, SIMULATED]))]
    first = None if known.empty else known.sort_values("way", kind="stable").index[0]  # measured, simulated
    cells = []
    for index, value in values.items():
        compared = first is not None and index != first
        if compared and same_device:
            compared = _same_device(sources.loc[index], sources.loc[first, "device"])
        cells.append(_cell(value, values[first] if compared else None, unit))
    return cells


def _cell(value: float, reference: float | None, unit: float) -> str:
    """A figure and how far it is from the one that it is compared with."""
    if pd.isna(value):
        return "-"
    shown = f"{value / unit:,.0f}" if value / unit >= 1e3 else f"{value / unit:,.2f}"
    if 0 < value / unit < 0.005:
        shown = "<0.01"  # the norm's few bytes
    if not reference:
        return shown
    return f"{shown} ({'equal' if value == reference else f'{value / reference - 1:+.1%}'})"


def _same_device(source: pd.Series, measured: str) -> bool:
    """Whether a time is of the device that was measured: `h100` is an NVIDIA H100 80GB HBM3."""
    if source["way"] == MEASURED:
        return bool(source["device"] == measured)
    name = source["device"].lower().partition("-")[0] if isinstance(source["device"], str) else ""
    return bool(name) and name in measured.lower()


def _picture(line: str, rank: int, sources: pd.DataFrame) -> list[Bars]:
    """Bars of memory by part; measured rows that hold the same are drawn once."""
    kept = sources.dropna(subset=[*PARTS]).drop_duplicates(["way", *PARTS])
    if kept.empty:
        return []
    names = kept["way"].where(~kept["way"].duplicated(keep=False), kept["way"] + ", " + kept["source"])
    sizes = kept[[*PARTS]].rename(columns=PARTS).set_axis([*names]).astype(float)
    return [bars_of(f"Peak memory of rank {rank}", line, sizes)]
