"""A study's file, what it runs, how an axis is extended, and its table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_crnet.config.batch import plan_batches
from megatron_crnet.config.loading import resolved
from megatron_crnet.reporting.study import RESULTS, append_row, extended, learning_curve, read_rows
from megatron_crnet.reporting.study_grid import MOST_EXTENSIONS, Run, Study, read_study
from megatron_crnet.reporting.study_table import plot_curves, plot_study, study_table
from megatron_crnet.utils.errors import ConfigError
from megatron_crnet.utils.files import read_json_lines

ROOT = Path(__file__).parents[3]
FILE: dict[str, Any] = {
    "base": str(ROOT / "examples" / "quickstart.yaml"),
    "tokens": 100_000,
    "options": {"optimizer.lr_warmup_steps": 5},
    "axes": {"model.variant": ["crnet", "cola"], "optimizer.lr": {"values": [0.001, 0.01], "extend": 10}},
    "seeds": [1, 2],
}


def study(folder: Path, **changes: Any) -> Study:
    path = folder / "study.yaml"
    path.write_text(json.dumps({k: v for k, v in {**FILE, **changes}.items() if v is not None}))
    return read_study(path, folder / "results")


def rows_of(grid: Study, losses: dict[tuple[str, float], float | None]) -> dict[str, dict[str, Any]]:
    """Rows of all runs whose loss is given; None diverged."""
    rows = {}
    for run in grid.runs():
        place = run.settings["model.variant"], run.settings["optimizer.lr"]
        if place in losses:
            loss = losses[place]
            known = {"status": "diverged" if loss is None else "complete", "validation_loss": loss}
            rows[run.key] = {"settings": run.settings, "seed": run.seed, "parameters": 2_000_000, **known}
    return rows


def test_the_grid_is_every_combination_with_every_seed_and_the_budget_in_tokens(tmp_path: Path) -> None:
    grid = study(tmp_path)
    runs = list(grid.runs())
    assert len(runs) == len({run.name for run in runs}) == 8
    config = grid.config(Run({"model.variant": "cola", "optimizer.lr": 0.01}, 2))
    assert (config.model.variant, config.optimizer.lr, config.training.seed) == ("cola", 0.01, 2)
    assert config.training.train_steps == 100_000 // (8 * 256)
    assert config.optimizer.lr_warmup_steps == 5
    assert config.checkpoint.dir is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": {}}, 'unknown key "axis": did you mean axes?'),
        ({"base": None}, "has no base"),
        ({"axes": {}}, "axes is empty"),
        ({"axes": {"optimizer.lr": []}}, r"axes\.optimizer\.lr has no values"),
        ({"axes": {"optimizer.lr": [1, 1]}}, "holds 1 twice"),
        ({"axes": {"optimizer.lr": {"values": [1], "grow": 3}}}, "must be a list of values, or"),
        ({"axes": {"optimizer.lr": {"values": [0], "extend": 3}}}, "must be numbers above 0"),
        ({"axes": {"optimizer.lr": {"values": [1], "extend": 1}}}, "extend is 1, but must be a finite number from"),
        ({"axes": {"optimizer": [1]}}, "is not an option of a section"),
        ({"axes": {"size": {}}}, "its values are names with options"),
        ({"axes": {"size": {"small": {}}}}, "its values are names with options"),
        ({"axes": {"size": {"small": {"rank": 4}}}}, "rank is not an option of a section"),
        ({"axes": {"size": {"small": {"training.seed": 4}}}}, "is set by the study"),
        ({"axes": {"size": {"s": {"model.rank": 4}}, "model.rank": [4]}}, "is in two axes"),
        ({"axes": {"training.seed": [1]}}, "is set by the study"),
        ({"options": {"checkpoint.dir": "all"}}, "is set by the study"),
        ({"axes": {"optimizer.lr_warmup_steps": [1]}}, "is an axis and an option"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [-1]}, "seeds is"),
        ({"options": {"training.train_steps": 5}}, "follows from tokens"),
    ],
)
def test_a_file_that_is_not_a_study_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        study(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {"optimizer.rate": [1]}}, r"study\.yaml: unknown key optimizer\.rate"),
        ({"axes": {"model.variant": ["crnet", "colla"]}}, "did you mean cola"),
        ({"options": {"optimizer.lr_warmup_steps": 48}}, "is not below training.train_steps 48"),
        ({"options": {"training.eval_steps": 0, "optimizer.lr_warmup_steps": 5}}, "compared by validation loss"),
        ({"options": {"training.eval_only": True, "optimizer.lr_warmup_steps": 5}}, "runs of a study train"),
        ({"options": {"training.micro_batch_size": 3, "optimizer.lr_warmup_steps": 5}}, "does not divide"),
    ],
)
def test_what_no_run_can_honour_is_refused_before_the_first(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        study(tmp_path, **changes).check()


def test_schedules_are_checked_with_the_steps_that_follow_from_the_tokens(tmp_path: Path) -> None:
    changes = {"rank_schedule.steps": [400], "rank_schedule.ranks": [96], "logging.profile_steps": [450, 460]}
    relora = {"model.variant": "relora", "relora.warm_start_steps": 400, "relora.restart_interval": 20}
    relora |= {"relora.prune": "reset"}
    axes = {"method": {"ranks": changes, "relora": relora}}  # beyond the 300 steps of the base
    grid = study(tmp_path, tokens=1_000_000, axes=axes, options={"optimizer.lr_warmup_steps": 5})
    assert {grid.config(run).training.train_steps for run in grid.runs()} == {488}
    early = study(tmp_path, axes={"method": {"ranks": changes}}, options={"optimizer.lr_warmup_steps": 5})
    with pytest.raises(ConfigError, match=r"rank_schedule.steps \[400\] must ascend and end below .* 48"):
        early.config(next(early.runs()))


def test_the_budgets_of_papers_are_budgets(tmp_path: Path) -> None:
    grid = study(tmp_path, tokens=26_000_000_000, options={"training.global_batch_size": 4096})
    assert grid.config(next(grid.runs())).training.train_steps == 26_000_000_000 // (4096 * 256)
    grid = study(tmp_path, tokens=10**9, options={"training.global_batch_size": 8192})
    assert grid.config(next(grid.runs())).training.train_steps == 10**9 // (8192 * 256)


def test_a_batch_size_that_grows_keeps_the_budget(tmp_path: Path) -> None:
    options = {"training.global_batch_size": 16, "optimizer.lr_warmup_steps": 1}
    axes = {"training.rampup_batch_size": [None, [8, 8, 40]]}
    grid = study(tmp_path, tokens=20_480, axes=axes, options=options, seeds=[1])
    configs = [grid.config(run) for run in grid.runs()]
    trained = [plan_batches(config, 1).tokens_of_run(config.training.train_steps) for config in configs]
    assert configs[0].training.train_steps < configs[1].training.train_steps
    assert all(20_480 - 16 * 256 < tokens <= 20_480 for tokens in trained)


def test_options_that_belong_together_are_an_axis_of_names(tmp_path: Path) -> None:
    sizes = {
        "small": {"model.hidden_size": 32, "model.rank": 8},
        "large": {"model.hidden_size": 64, "optimizer.lr_multipliers": {"embedding": 2}},
    }
    grid = study(tmp_path, axes={"size": sizes, "optimizer.lr": [0.1]})
    small, large = (grid.config(run) for run in grid.runs() if run.seed == 1)
    assert (small.model.hidden_size, small.model.rank, small.optimizer.lr_multipliers) == (32, 8, {"embedding": 24})
    assert (large.model.hidden_size, large.model.rank, large.optimizer.lr_multipliers) == (64, 48, {"embedding": 2})
    rows = {run.key: result(grid, run, 4.0) for run in grid.runs()}
    assert "size=small, lr=0.1" in study_table(grid, rows)


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr("megatron_crnet.reporting.study_grid.read_index", lambda prefix: None)
    return study(tmp_path)


def values(grid: Study) -> tuple[Any, ...]:
    return grid.axes[1].values


def test_an_axis_is_extended_for_all_until_each_best_is_inside(grid: Study) -> None:
    losses: dict[tuple[str, float], float | None] = {
        ("crnet", 0.001): 4.0,
        ("crnet", 0.01): 5.0,
        ("cola", 0.001): 4.5,
        ("cola", 0.01): 4.0,
    }
    both = extended(grid, rows_of(grid, losses), grid)
    assert values(both) == (0.0001, 0.001, 0.01, 0.1)
    losses |= {("crnet", 0.0001): 4.1, ("crnet", 0.1): None, ("cola", 0.0001): 6.0, ("cola", 0.1): 4.2}
    assert extended(both, rows_of(both, losses), grid) == both, "inside"
    losses["cola", 0.1] = 3.9
    assert values(extended(both, rows_of(both, losses), grid)) == (0.0001, 0.001, 0.01, 0.1, 1.0)


def test_an_axis_of_integers_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_crnet.reporting.study_grid.read_index", lambda prefix: None)
    grid = given = study(tmp_path, axes={"model.rank": {"values": [2, 8], "extend": 2}})
    said = list[str]()
    for _ in range(3):
        rows = {
            run.key: {"status": "complete", "settings": run.settings, "validation_loss": run.settings["model.rank"]}
            for run in grid.runs()
        }
        grid = extended(grid, rows, given, said.append)
    assert grid.axes[0].values == (1, 2, 8)
    assert all(type(value) is int for value in grid.axes[0].values)
    assert "model.rank is 0, but must be a rank from 1" in said[-1]


def test_an_extension_ends_at_a_limit_and_where_nothing_is_known(grid: Study) -> None:
    said: list[str] = []
    assert extended(grid, rows_of(grid, {("crnet", 0.001): None, ("crnet", 0.01): None}), grid, said.append) == grid
    assert said == []
    now = grid
    for _ in range(MOST_EXTENSIONS + 1):
        falling = {(variant, value): -value for variant in ("crnet", "cola") for value in values(now)}
        before, now = now, extended(now, rows_of(now, falling), grid, said.append)
    assert now == before
    assert values(now) == (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
    assert said[-1].startswith("warning: the best optimizer.lr of crnet is at the edge, 100: ")


def result(grid: Study, run: Run, loss: float) -> dict[str, Any]:
    about = {"settings": run.settings, "seed": run.seed, "parameters": 1, "config": resolved(grid.config(run))}
    return {**about, "status": "complete", "validation_loss": loss}


def test_results_are_read_back_and_those_of_another_study_refused(grid: Study, tmp_path: Path) -> None:
    grid.output.mkdir()
    first, second, *_ = grid.runs()
    path = grid.output / RESULTS
    append_row(path, result(grid, first, 4.0))
    with path.open("a") as file:
        file.write('{"settings": {"model.va')  # the process was killed
    append_row(path, result(grid, second, 5.0))
    assert len(read_json_lines(path)) == 2
    found = read_rows(grid)
    assert [found[run.key]["validation_loss"] for run in (first, second)] == [4.0, 5.0]
    assert read_rows(study(tmp_path, seeds=[1, 2, 3])).keys() == found.keys()
    for changes, message in (
        ({"tokens": 200_000}, r"training\.train_steps 48 instead of 97"),
        ({"options": {**FILE["options"], "model.rank": 8}}, r"model\.rank 48 instead of 8"),
        ({"options": {**FILE["options"], "checkpoint.load": "a"}}, r'checkpoint\.load null instead of "a"'),
        ({"axes": {"optimizer.lr": [0.001]}}, r"axes model\.variant, optimizer\.lr instead of optimizer\.lr"),
    ):
        with pytest.raises(ConfigError, match=rf"holds the results of another study \({message}\)"):
            read_rows(study(tmp_path, **changes))


def test_the_table_has_mean_and_deviation_over_seeds_and_the_best(grid: Study, tmp_path: Path) -> None:
    rows = rows_of(grid, {("crnet", 0.001): 4.0, ("crnet", 0.01): None, ("cola", 0.01): 4.5})
    runs = [run for run in grid.runs() if run.settings == {"model.variant": "crnet", "optimizer.lr": 0.001}]
    rows[runs[1].key]["validation_loss"] = 4.2
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in study_table(grid, rows).splitlines()]
    assert lines[0] == ["variant", "parameters", "lr 0.001", "lr 0.01", "best"]
    assert lines[2:] == [
        ["crnet", "2.00M", "4.1000 ± 0.1414", "2 diverged", "4.1000 ± 0.1414 at 0.001"],
        ["cola", "2.00M", "-", "4.5000 ± 0.0000", "4.5000 ± 0.0000 at 0.01"],
    ]
    plot_study(grid, rows, tmp_path / "losses.png")
    fixed = grid.with_axis(replace(grid.axes[1], extend=None))
    line = study_table(fixed, rows).splitlines()[2]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["crnet, lr=0.001", "2.00M", "4.1000 ± 0.1414"]
    plot_study(fixed, rows, tmp_path / "fixed.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_learning_curves_are_drawn_of_runs_that_validated_on_their_way(grid: Study, tmp_path: Path) -> None:
    lines = [{"tokens": n, "validation_loss": loss} for n, loss in ((10, 5.0), (20, 4.5), (10, 4.9))]
    assert learning_curve([*lines, {"tokens": 30, "loss": 4.0}]) == [(10, 4.9), (20, 4.5)], "10 was made again"
    rows = rows_of(grid, {("crnet", 0.001): 4.0, ("crnet", 0.01): None, ("cola", 0.01): 4.5})
    plot_curves(grid, rows, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists(), "these rows have no curve"
    for row in rows.values():
        row["curve"] = [[10, 5.0], [20, 4.5]]
    plot_curves(grid, rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_can_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("megatron_crnet.reporting.study_grid.read_index", lambda prefix: None)
    read_study(path, tmp_path).check()
