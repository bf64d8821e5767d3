"""Rows and sweeps of a benchmark, and the arithmetic on what rows answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_crnet.config.loading import load_config
from megatron_crnet.reporting import benchmark
from megatron_crnet.reporting.benchmark import BenchmarkPlan, Candidate
from megatron_crnet.reporting.benchmark_rows import SWEEPS, Row, parse_row, sweep_rows
from megatron_crnet.reporting.step_identity import identify_step
from megatron_crnet.reporting.training_rank import StepTiming, WorkerReady
from megatron_crnet.utils.environment import command_line
from megatron_crnet.utils.errors import ConfigError

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart.yaml"
OPTIONS = ["--config", str(QUICKSTART)]


def measured(row: Row, times: list[float], options: list[str] = OPTIONS) -> Candidate:
    """A row that took `times`, on two ranks of which the second needs half as long."""
    steps = [[StepTiming(s, s / 4, 1.0, 2.0), StepTiming(s / 2, s / 4, 1.0, 2.0)] for s in times]
    ready = [
        WorkerReady({"weights": 4, "optimizer": 3, "gradients": 2, "activations": 1}, {"TP all_reduce": 10}, 7),
        WorkerReady({"weights": 1, "optimizer": 1, "gradients": 1, "activations": 1}, {"PP send": 5}, 8),
    ]
    return Candidate(row, row.config(options), ready=ready, steps=steps)


def test_a_row_says_its_name_its_processes_and_its_options() -> None:
    assert parse_row("two x2: --model.rank 32 --logging.output_dir 'a b'") == Row(
        "rows", "two", 2, ("--model.rank", "32", "--logging.output_dir", "a b")
    )
    assert parse_row("as it is:") == Row("rows", "as it is")


@pytest.mark.parametrize("text", ["", "--model.rank 32", ": --model.rank 32", "none x0: ", "open: '"])
def test_a_row_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--row is"):
        parse_row(text)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_sweeps_hold_only_configurations_that_exist(sweep: str) -> None:
    config = load_config(QUICKSTART)
    rows = sweep_rows(sweep, config, 4)
    # four pipeline stages want a multiple of four layers; in the quickstart that row is refused
    found = [row.config([*OPTIONS, "--model.num_layers", "8"]) for row in rows]
    assert len(rows) >= 3
    assert len({row.name for row in rows}) == len(rows)
    sizes = [c.training.global_batch_size for c in found]
    assert sizes == ([8, 16, 32] if sweep == "weak" else [8] * len(rows))
    if sweep in ("strong", "weak"):
        assert [row.processes for row in rows] == [1, 2, 4]
    else:
        assert {row.processes for row in rows} == {4}


@pytest.mark.parametrize("example", ["galore_60m", "relora_60m"])
def test_sweeps_around_one_method_hold_the_others_by_themselves(example: str) -> None:
    path = f"examples/methods/{example}.yaml"
    for sweep in ("variants", "methods"):
        rows = {row.name: row.config([f"--config={path}"]) for row in sweep_rows(sweep, load_config(path), 1)}
        assert rows["full_rank"].optimizer.name == "adamw"
        assert sweep == "variants" or rows["full_rank, GaLore"].optimizer.name == "galore"


def test_ratios_are_medians_within_repeats() -> None:
    slow = measured(Row("rows", "slow"), [1.0, 10.0, 2.0])  # a busy moment hit both rows of the second repeat
    fast = measured(Row("rows", "fast", 2, ("--training.global_batch_size", "16")), [1.0, 8.0, 2.0])
    first, second = benchmark._records([slow, fast], peak=1e12)
    assert first["speed_of_first"] == 1.0
    assert second["speed_of_first"] == 2.0  # twice the tokens in the same time, but for the second repeat
    assert second["median_s"] == 2.0
    assert second["spread"] == 3.5
    assert second["cpu_seconds"] == [0.5, 4.0, 1.0]
    assert second["tokens_per_s"] == 16 * 256 / 2.0
    flops = second["flops_per_token"] * second["tokens_per_s"] / 2
    assert second["mfu"] == pytest.approx(flops / 1e12)
    whole = second["flops_per_token_whole_attention"] / second["flops_per_token"]
    assert second["mfu_whole_attention"] == pytest.approx(whole * flops / 1e12)
    assert whole > 1
    assert second["peak_bytes"] == 10
    assert second["traffic"] == {"TP all_reduce": 10, "PP send": 5}
    assert [(r["operations"], r["traffic"]) for r in second["ranks"]] == [
        (7, {"TP all_reduce": 10}),
        (8, {"PP send": 5}),
    ]
    assert second["ranks"][1]["memory"]["weights"] == 1
    assert second["step"] == identify_step(fast.row.config(OPTIONS), 2)


def test_rows_that_failed_or_never_had_their_turn_stay_without_figures() -> None:
    refused, twin = benchmark._candidates([Row("rows", "bad", 1, ("--model.rank", "0"))], OPTIONS)[0], Row("rows", "x")
    later, ok = Candidate(twin, twin.config(OPTIONS)), measured(Row("rows", "ok"), [1.0])
    records = benchmark._records([refused, later, ok], peak=1e12)
    assert "model.rank is 0" in records[0]["error"]
    assert ["median_s" in record for record in records] == [False, False, True]
    assert records[2]["speed_of_first"] == 1.0


def test_equal_rows_are_measured_once() -> None:
    rows = [Row("a", "x"), Row("b", "y", 1, ("--model.variant", "crnet")), Row("b", "two", 2)]
    first, second, third = benchmark._candidates(rows, OPTIONS)
    assert second.twin is first
    assert first.twin is None
    assert third.twin is None
    first.steps = measured(first.row, [2.0]).steps
    assert [r["median_s"] for r in benchmark._records([first, second], 1.0)] == [2.0, 2.0]


@pytest.mark.parametrize("change", [{"repeats": 0}, {"threads": 0}, {"warm_up": 0}, {"peak_flops": 0.0}])
def test_plans_that_measure_nothing_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be above 0"):
        dataclasses.replace(BenchmarkPlan(), **change)
    with pytest.raises(ConfigError, match=r"peak_tflops is -1\.0, but"):
        BenchmarkPlan(peak_flops=-1e12)


def test_the_command_names_no_folder_of_this_machine() -> None:
    program = str(QUICKSTART.parents[1] / "tools" / "benchmark.py")
    assert command_line([program, "--row", "a: b"]) == "python tools/benchmark.py --row 'a: b'"
    assert command_line(["/somewhere/else.py"]) == "python else.py"
