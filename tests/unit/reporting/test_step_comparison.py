"""One step estimated, simulated and measured: what stands beside each other in a report."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_crnet.config.schema import Config
from megatron_crnet.reporting.step_identity import identify_step
from tests.unit.reporting.report_files import (
    MEMORY,
    STEP,
    measured_row,
    sides,
    write_benchmark,
    write_counted,
    write_estimate,
    write_run,
)


def test_figures_of_one_step_stand_beside_each_other(tool: ModuleType, tmp_path: Path) -> None:
    lines = sides(
        tool,
        tmp_path,
        write_estimate(tmp_path / "e.json"),
        write_counted(tmp_path / "s.json", 1, 5),
        write_benchmark(tmp_path / "b.json", measured_row()),
    )
    assert f"**{STEP['line']}; rank 1**" in lines
    assert "| source | peak memory, MiB | operations, GFLOP | PP, MiB | ms/step | tokens/s |" in lines
    # the rank that was simulated, of the stage that holds it; times of another machine stand alone
    assert "| estimated: e, for h100 | 10.00 (+25.0%) | 5.00 (equal) | 4.00 (equal) | 250.00 | 4,000 |" in lines
    assert "| simulated: s | 10.00 (+25.0%) | 5.00 (equal) | 4.00 (equal) | - | - |" in lines
    assert "| measured: b, rows: two, 2 ranks | 8.00 | 5.00 | 4.00 | 500.00 | 2,000 |" in lines
    assert not any(line.startswith("- left out") for line in lines)


def test_a_time_is_compared_on_the_device_that_was_measured(tool: ModuleType, tmp_path: Path) -> None:
    estimate = write_estimate(tmp_path / "e.json", "abacus")
    lines = sides(tool, tmp_path, estimate, write_benchmark(tmp_path / "b.json", measured_row()))
    found = next(line for line in lines if line.startswith("| estimated: e, for abacus"))
    assert found.endswith("| 250.00 (-50.0%) | 4,000 (+100.0%) |")
    assert any("; rank 1**" in line for line in lines)  # the fullest stage, without a simulation


def test_without_a_measurement_the_simulation_is_compared_with(tool: ModuleType, tmp_path: Path) -> None:
    estimate, simulation = write_estimate(tmp_path / "e.json"), write_counted(tmp_path / "s.json", 1, 15)
    lines = sides(tool, tmp_path, estimate, simulation)
    assert any(line.startswith("| estimated: e, for h100 | 10.00 (-50.0%) |") for line in lines)
    assert any(line.startswith("| simulated: s | 20.00 |") for line in lines)


def test_a_run_is_measured_by_its_time_alone(tool: ModuleType, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    estimate = write_estimate(tmp_path / "e.json", step=identify_step(Config(), 2))
    lines = sides(tool, tmp_path, run, estimate)
    assert "| measured: run run | - | - | - | 500.00 | 200.00 |" in lines


OTHER = {**STEP, "fingerprint": "another"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": OTHER}, "nothing to compare with e (estimated): crnet of 1M parameters, 2 ranks"),
        ({"step": None}, "made before files named their step, so in no pair: e"),
        ({"step": {"fingerprint": 7}}, "made before files named their step, so in no pair: e"),
        ({"world_size": "2"}, "nothing to compare with e (estimated)"),
        ({"world_size": 3}, "nothing to compare with e (estimated)"),
        ({"world_size": 0}, "nothing to compare with e (estimated)"),
    ],
)
def test_what_has_no_pair_is_named(tool: ModuleType, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    estimate = write_estimate(tmp_path / "e.json", **changes)
    lines = sides(tool, tmp_path, estimate, write_benchmark(tmp_path / "b.json", measured_row()))
    assert any(said in line for line in lines)
    assert not any(line.startswith("**") for line in lines)


@pytest.mark.parametrize("ranks", [None, [], [3], "text", [{"memory": MEMORY, "traffic": 7}]])
def test_a_row_without_figures_of_the_rank_keeps_its_time(tool: ModuleType, tmp_path: Path, ranks: Any) -> None:
    benchmark = write_benchmark(tmp_path / "b.json", measured_row(ranks=ranks))
    lines = sides(tool, tmp_path, write_estimate(tmp_path / "e.json"), benchmark)
    assert "| measured: b, rows: two, 2 ranks | - | - | - | 500.00 | 2,000 |" in lines
    assert any("row 1, two,: damaged and left out: ranks" in line for line in lines) == bool(ranks)
