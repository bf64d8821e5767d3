"""A report from made-up files: every section is there, and damage is one line while the rest is reported."""

from __future__ import annotations

import copy
import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_crnet.config.loading import save_config
from megatron_crnet.config.model_size import flops_per_token
from megatron_crnet.config.schema import Config
from megatron_crnet.reporting.inputs import read_inputs
from megatron_crnet.reporting.page import markdown_page
from megatron_crnet.reporting.scaling_report import build_sections
from megatron_crnet.reporting.steps import PARTS
from tests.unit.reporting.report_files import (
    ROWS,
    Checker,
    measured_row,
    report,
    row,
    write_benchmark,
    write_counted,
    write_estimate,
    write_run,
    write_simulation,
)

ROOT = Path(__file__).parents[3]
SECTIONS = (
    *("In short", "Loss", "Speed by number of ranks", "Variants, layouts, recomputation"),
    *("Estimated, simulated, measured", "Memory by part", "Traffic by kind", "Where these figures come from"),
)


def test_every_section_is_there_with_its_pictures(tool: ModuleType, tmp_path: Path) -> None:
    inputs = [
        write_run(tmp_path / "first"),
        write_run(tmp_path / "second", 4),
        write_benchmark(tmp_path / "benchmark.json", *ROWS, measured_row(), {"name": 7}),
        write_estimate(tmp_path / "estimate.json"),
        write_simulation(tmp_path / "simulation.json"),
    ]
    status, page, markdown = report(tool, tmp_path, *inputs)
    assert status == 0
    # what most people look for is first, where figures come from last
    assert tuple(line[3:] for line in markdown.splitlines() if line.startswith("## ")) == SECTIONS
    for title in SECTIONS:
        assert f"<h2>{title}</h2>" in page
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    # loss twice, tokens/s, speed-up, MFU, recomputation, side by side, memory twice
    assert checker.pictures == 9
    commands = ("python pretrain_crnet.py --config my.yaml", "python tools/estimate.py --x")
    for figure in ("665.14", "abacus", f"row {len(ROWS) + 2} is damaged (", *commands):
        assert figure in page
    assert "anything measured on a GPU" in markdown
    assert re.search(r"\| +1.41 \| +71% \|", markdown)  # two ranks at 1.41 times the speed, in whole percent
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert 'name="viewport"' in page


@pytest.mark.fault("section-5")
def test_a_run_has_its_validation_curve_beside_its_training_loss(tool: ModuleType, tmp_path: Path) -> None:
    status, page, markdown = report(tool, tmp_path, write_run(tmp_path / "run"))
    assert status == 0
    assert "run, validation" in page
    headline = next(line for line in markdown.splitlines() if line.startswith("| run "))
    for words in ("validation loss", "perplexity", "tokens/s", "steps"):
        assert words in headline
    aligned = markdown.splitlines()[markdown.splitlines().index(headline) + 1]
    assert aligned.count("-:|") >= 8  # numbers to the right


@pytest.mark.fault("B22")
def test_the_headline_has_mfu_with_half_and_with_whole_attention(tool: ModuleType, tmp_path: Path) -> None:
    folder, peak = write_run(tmp_path / "run", 2), "--peak-tflops=0.001"
    status, _, markdown = report(tool, tmp_path, folder, Path(peak))
    assert status == 0
    head, _, line = markdown[markdown.index("| run ") :].splitlines()[:3]
    found = dict(zip(*([cell.strip() for cell in row.split("|")] for row in (head, line)), strict=True))
    config = Config()
    for name, whole in (("MFU", False), ("MFU, whole attention", True)):
        operations = flops_per_token(config.model, config.training.seq_length, whole_attention=whole) * 200 / 2
        assert found[name] == f"{operations / 1e9:.1%}"
    assert "with attention whole, as PaLM, torchtitan and nanochat count" in markdown
    assert "MFU of run: of 0.001 TFLOP/s per device (--peak-tflops)" in markdown
    changed = replace(config, data=replace(config.data, reset_attention_mask=True))
    save_config(changed, folder / "config.yaml")
    assert re.search(r"\d% \| +- \|", report(tool, tmp_path, folder, Path(peak))[2]), "by the lengths of documents"


def test_the_peak_is_that_of_the_runs_card_and_is_named(tool: ModuleType, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 2)
    assert "MFU of" not in report(tool, tmp_path, folder)[2]
    facts = json.loads((folder / "run.json").read_text())
    facts["machine"]["gpus"] = ["NVIDIA H200"]
    (folder / "run.json").write_text(json.dumps(facts))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[:-1]:
        line |= {"tflops_per_device": 33.5, "tflops_per_device_whole_attention": 40.2}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    markdown = report(tool, tmp_path, folder)[2]
    assert "MFU of run: of 67 TFLOP/s per device (data sheet of h200, fp32)" in markdown
    assert re.search(r"\| +50.0% \| +60.0% \|", markdown)


@pytest.mark.fault("section-5")
def test_what_is_absent_is_one_line_at_the_end_and_says_what_makes_it(tool: ModuleType, tmp_path: Path) -> None:
    status, page, markdown = report(tool, tmp_path, write_run(tmp_path / "run"))
    assert status == 0
    lines = [line for line in markdown.splitlines() if "Not in this report" in line]
    assert len(lines) == 1
    assert markdown.index(lines[0]) > markdown.index("Where these figures come from")
    for sweep in ("strong", "weak", "recompute", "variants"):
        assert f"--sweep {sweep}" in lines[0]
    for title in SECTIONS[2:7]:
        assert title not in page


@pytest.mark.fault("M10")
def test_an_older_page_is_replaced_only_when_asked(tool: ModuleType, tmp_path: Path) -> None:
    run, page = write_run(tmp_path / "run"), tmp_path / "report.html"
    page.write_text("mine")
    assert tool.main([str(run), "-o", str(page)]) == 2
    assert page.read_text() == "mine"
    assert not page.with_suffix(".md").exists()
    assert tool.main([str(run), "-o", str(page), "--overwrite"]) == 0


DAMAGED: dict[str, tuple[str | None, str]] = {
    "absent.json": (None, "cannot be read"),
    "empty.json": ("", "is not valid JSON"),
    "cut.json": ('{"kind": "benchmark", "rows": [{"na', "is not valid JSON"),
    "other.json": ('{"a": [1, 2, {"b": "c"}]}', "holds no benchmark"),
    "nothing.json": ("[]", "holds no benchmark"),
    "strategies.json": (
        '{"kind": "recompute", "rows": 3}',
        "holds no benchmark, estimate, simulation, profile or observation: left out",
    ),
    "rows.json": ('{"kind": "benchmark", "rows": 3}', "has no row that was measured and is whole: left out"),
    "metrics.jsonl": ('{"step": 1}\n{"st', "cannot be read, or not as a whole: left out"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named_and_the_rest_is_reported(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text, reason = DAMAGED[name]
    damaged = tmp_path / "damaged" / name
    damaged.parent.mkdir()
    if text is not None:
        damaged.write_text(text)
    status, page, markdown = report(tool, tmp_path, damaged, write_run(tmp_path / "run"))
    assert status == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert any(str(damaged) in line and reason in line for line in warnings)
    assert reason in page
    assert "run, 4 lines, 2 processes" in markdown


def test_nothing_readable_ends_with_status_2_and_no_page(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    status, page, markdown = report(tool, tmp_path, tmp_path / "folder", tmp_path / "absent")
    assert (status, page, markdown) == (2, "", "")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: none of the 2 inputs could be read")


def test_a_run_may_lack_its_configuration_and_facts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "run.json").unlink()
    found = read_inputs([run])
    assert found.runs[0].processes is None
    (run / "config.yaml").write_text("model: [")
    found = read_inputs([run])
    assert found.runs[0].config is None
    assert len(found.problems) == 2


def test_a_damaged_row_leaves_the_others(tmp_path: Path) -> None:
    rows = (
        row("rows", "whole"),
        row("rows", "text", median_s="0.5"),
        row("rows", "no parts", memory=None),
        row("rows", "nan", peak_bytes=float("nan")),
        {"sweep": "rows", "name": "refused", "processes": 1, "error": "rank 0"},
        row("rows", "died", error="it ended by itself"),
    )
    found = read_inputs([write_benchmark(tmp_path / "b.json", *rows, 7)])  # type: ignore[arg-type]
    assert [r["name"] for r in found.rows] == ["whole", "died"]
    assert len(found.problems) == 6
    assert "row 6, died, was measured in part: it ended by itself" in found.problems[4]
    assert "row 5, refused, was not measured: rank 0" in found.problems[3]


def test_losses_over_time_add_up_the_steps(tmp_path: Path) -> None:
    run = read_inputs([write_run(tmp_path / "run")]).runs[0]
    assert run.points("loss", "seconds") == [(0.5, 7.9), (2.5, 7.5), (5.0, 7.0)]
    assert run.points("validation_loss") == [(1000, 6.5)]


def test_the_parts_of_a_simulation_add_up_to_its_peak(tmp_path: Path) -> None:
    profile = read_inputs([write_simulation(tmp_path / "s.json")]).profiles[0]
    parts = {"weights": 10, "optimizer": 30, "gradients": 20, "activations": 55}
    assert {part: profile[part] for part in PARTS} == parts
    assert profile["traffic"] == {"DP all_gather": 2 << 20}


HOSTILE: tuple[Any, ...] = (
    *(5, -1, 1e308, 1e-308, 10**400, -(10**30), True, None, "", "x", "9" * 500, "\ud800", "<script>|`$x$", "_x"),
    *([], [[]], {}, {"a": 1}, {"\ud800": 1}, float("nan"), float("inf"), ["x"] * 3, [None], "\x00\x1b[2J"),
)


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value something else could stand."""
    yield way
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*way, key))


def replaced(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    if not way:
        return new
    changed = copy.copy(value)
    changed[way[0]] = replaced(value[way[0]], way[1:], new)
    return changed


@pytest.mark.fault("F10")
@pytest.mark.parametrize("kind", ["benchmark", "estimate", "simulation", "facts", "metrics"])
def test_whatever_stands_in_a_file_the_rest_is_reported(tmp_path: Path, kind: str) -> None:
    """Fifteen changes of each kind of file, without drawing; what is left out is named."""
    random_, run = random.Random(7), write_run(tmp_path / "run")
    files = {
        "benchmark": write_benchmark(tmp_path / "b.json", *(ROWS if kind == "benchmark" else ()), measured_row()),
        "estimate": write_estimate(tmp_path / "e.json"),
        "simulation": write_counted(tmp_path / "s.json", 1, 5),
        "facts": run / "run.json",
        "metrics": run / "metrics.jsonl",
    }
    path = files[kind]
    lines = path.read_text().splitlines() if kind == "metrics" else [path.read_text()]
    for _ in range(15):
        number = random_.randrange(len(lines))
        value = json.loads(lines[number])
        way = random_.choice([*places(value)])
        changed = json.dumps(replaced(value, way, random_.choice(HOSTILE)))
        path.write_text("\n".join([*lines[:number], changed, *lines[number + 1 :]]) + "\n")
        found = read_inputs([run, *(file for name, file in files.items() if name not in ("facts", "metrics"))])
        sections = build_sections(found, 1e12, "command")
        text = markdown_page("t", "i", sections) + "".join(table.html() for s in sections for table in s.tables)
        text.encode("utf-8", "replace")
        assert found.runs
        assert len(found.of_kind("benchmark", "estimate", "simulation")) >= 2
        assert all("\n" not in line for line in found.say())


@pytest.mark.fault("F10")
@pytest.mark.parametrize(
    ("way", "new"),
    [
        (("rows", 0, "median_s"), 10**400),
        (("peak_flops",), {}),
        (("machine", "gpus"), 1e308),
        (("rows", 0, "name"), "\ud800"),
        (("rows", 0, "name"), "_$</svg><script>alert(1)</script>"),
        (("rows", 0, "traffic"), {"\ud800 all_reduce": 1}),
        (("rows", 1, "peak_bytes"), 1e308),
        (("versions",), {"torch": "\x00"}),
    ],
)
def test_a_hostile_benchmark_is_drawn_without_its_damaged_part(
    tool: ModuleType, tmp_path: Path, way: tuple[Any, ...], new: Any
) -> None:
    path = write_benchmark(tmp_path / "b.json")
    path.write_text(json.dumps(replaced(json.loads(path.read_text()), way, new)))
    status, page, markdown = report(tool, tmp_path, path)
    assert status == 0
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.pictures >= 5
    damaged = not isinstance(new, str) and way[0] != "versions" and "traffic" not in way
    assert markdown.count("- left out: ") == 1 + damaged  # no row names its step
    assert "4 of weak" in markdown


@pytest.mark.fault("F10")
@pytest.mark.parametrize(
    "text", ["5", "[" * 100_000, '{"a":' * 100_000, '{"kind": "benchmark", "rows": ' + "9" * 5000 + "}"]
)
def test_files_of_odd_json_are_named(tool: ModuleType, tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + text + "\n")
    (run / "run.json").write_text(text)
    (run / "odd.json").write_text(text)
    status, _, markdown = report(tool, tmp_path, run)
    assert status == 0
    lines = [line for line in markdown.splitlines() if line.startswith("- left out")]
    assert len(lines) == (2 if text.startswith('{"kind"') else 3)  # which is a mapping, and facts need nothing else
    assert "7.0000" in markdown


@pytest.mark.fault("F10")
def test_a_damaged_byte_costs_its_line_and_a_name_of_odd_bytes_is_shown(tool: ModuleType, tmp_path: Path) -> None:
    run = write_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff\n<b>")))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 11, "tokens\xff": 1, \xff}\n')
    status, page, markdown = report(tool, tmp_path, run)
    assert status == 0
    assert "line 5 cannot be read" in markdown
    assert "run\\xdcff &lt;b>" in markdown
    assert "<b>" not in page.partition("<main>")[2].partition("figcaption")[0]


def test_a_long_run_is_drawn_in_few_points(tool: ModuleType, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = ({"step": n, "tokens": n, "loss": 8 - n / 4000, "step_time_s": 0.1} for n in range(1, 20_001))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, page, _ = report(tool, tmp_path, run)
    assert status == 0
    assert len(page) < 200_000


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    found = read_inputs([write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")])
    assert [run.name for run in found.runs] == ["run", "run (2)"]
