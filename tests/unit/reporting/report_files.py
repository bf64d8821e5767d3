"""Made-up files of runs, benchmarks, estimates and simulations, and the report made of them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_crnet.config.loading import save_config
from megatron_crnet.config.model_size import flops_per_token
from megatron_crnet.config.schema import Config
from megatron_crnet.utils.environment import write_run_file

MEMORY = {"weights": 4 << 20, "optimizer": 8 << 20, "gradients": 4 << 20, "activations": 6 << 20}


def write_run(folder: Path, processes: int = 2) -> Path:
    folder.mkdir(parents=True)
    config = Config()
    save_config(config, folder / "config.yaml")
    write_run_file(folder, ["pretrain_crnet.py", "--config", "my.yaml"], processes)
    flops = flops_per_token(config.model, config.training.seq_length)
    lines = [
        {
            "step": step,
            "tokens": step * 100,
            "loss": 8.0 - step / 10,
            "step_time_s": 0.5,
            "tokens_per_s": 200.0,
            "tflops_per_device": flops * 200 / processes / 1e12,
        }
        for step in (1, 5, 10)
    ]
    last = {"step": 10, "tokens": 1000, "validation_loss": 6.5, "validation_perplexity": 665.14}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, last]))
    return folder


def row(sweep: str, name: str, processes: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "sweep": sweep,
        "name": name,
        "processes": processes,
        "error": None,
        "parameters": 1000,
        "flops_per_token": 6000.0,
        "tokens_per_step": 1024,
        "median_s": 0.5 + len(name) / 1000,
        "spread": 0.1,
        "tokens_per_s": 2000.0 * processes**0.5,
        "tflops_per_device": 0.01,
        "mfu": 0.25,
        "memory": MEMORY,
        "peak_bytes": sum(MEMORY.values()),
        "traffic": {"TP all_reduce": 2 << 20} if processes > 1 else {},
        "speed_of_first": processes**0.5,
        "cpu_speed_of_first": 1.0,
        **changes,
    }


ROWS = (
    *(row("variants", name) for name in ("full_rank", "crnet")),
    *(row("recompute", name) for name in ("none", "replay")),
    *(row(sweep, f"{n} of {sweep}", n) for sweep in ("strong", "weak") for n in (1, 2, 4)),
    row("layouts", "TP 2 x PP 1 x DP 1", 2),
)


def write_benchmark(path: Path, *rows: dict[str, Any]) -> Path:
    found = rows or ROWS
    facts = {"machine": {"processor": "abacus", "cores": 2, "gpus": []}, "versions": {"torch": "9"}, "complete": True}
    record = {"kind": "benchmark", "command": "python tools/benchmark.py --x", "device": "cpu", "peak_flops": 1e12}
    path.write_text(json.dumps({**record, **facts, "rows": found}))
    return path


def write_simulation(path: Path) -> Path:
    memory = {"weights": 10, "gradients": 20, "optimizer": 30, "buffers": 5, "kept": 7, "transient": 3, "update": 50}
    flow = {"kind": "all_gather", "group": "DP", "size": 8, "calls": 3, "bytes": 1 << 20}
    counted = {"memory": memory, "flows": [flow, flow], "flops": 1}
    path.write_text(json.dumps({"kind": "simulation", "counted": counted}))
    return path


def report(tool: ModuleType, tmp_path: Path, *inputs: Path) -> tuple[int, str, str]:
    target = tmp_path / "out" / "report.html"
    status = tool.main([*map(str, inputs), "-o", str(target), "--overwrite"])
    pages = [path.read_text() if path.exists() else "" for path in (target, target.with_suffix(".md"))]
    return status, pages[0], pages[1]


class Checker(HTMLParser):
    """Tags must close in order, and nothing may be loaded."""

    VOID = {"meta", "path", "rect", "polyline", "br", "use"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert all(not (value or "").startswith("http") for key, value in attrs if key in ("href", "src"))
        self.pictures += tag == "figure"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


STEP = {"fingerprint": "0123456789ab", "line": "crnet of 1M parameters, 2 ranks"}
STATE = {"weights": 1 << 20, "gradients": 1 << 20, "optimizer": 2 << 20, "buffers": 0}
PASSES = {**STATE, "kept": 5 << 20, "transient": 1 << 20, "reduction": 1, "update": 2}  # 10 MiB


def flow(group: str, kind: str, mebibytes: int) -> dict[str, Any]:
    return {"group": group, "kind": kind, "bytes": mebibytes << 20}


def write_estimate(path: Path, machine: str = "h100", **changes: Any) -> Path:
    """Two stages, of which the second is the fuller one."""
    small = {
        "memory": {**STATE, "kept": 0, "transient": 0},
        "operations": {"passes": 1, "recomputation": 0},
        "flows": [],
    }
    flows = [flow("PP", "send", 3), flow("PP", "all_reduce", 1)]
    large = {"memory": PASSES, "operations": {"passes": 4 * 10**9, "recomputation": 10**9}, "flows": flows}
    record = {
        "kind": "estimate",
        "command": "python tools/estimate.py --x",
        "step": STEP,
        "world_size": 2,
        "machine": {"name": machine, "peak_flops": 1e15},
        "stages": [small, large],
        "seconds": {"step": 0.25},
        "tokens_per_second": 4000.0,
    }
    path.write_text(json.dumps({**record, **changes}))
    return path


def write_counted(path: Path, rank: int, kept: int) -> Path:
    """A simulation of the fuller stage."""
    memory, flows = {**PASSES, "kept": kept << 20}, [flow("PP", "send", 4)]
    record = {
        "kind": "simulation",
        "command": "python tools/simulate.py --x",
        "step": STEP,
        "world_size": 2,
        "rank": rank,
    }
    counted = {"memory": memory, "flows": flows, "flops": 5 * 10**9}
    path.write_text(json.dumps({**record, "counted": counted}))
    return path


def measured_row(**changes: Any) -> dict[str, Any]:
    memory = {"weights": 1 << 20, "optimizer": 2 << 20, "gradients": 1 << 20, "activations": 4 << 20}  # 8 MiB
    first = {"memory": MEMORY, "operations": 1, "traffic": {"PP send": 1}}
    second = {"memory": memory, "operations": 5 * 10**9, "traffic": {"PP send": 2 << 20, "PP all_reduce": 2 << 20}}
    facts = {"step": STEP, "ranks": [first, second], "median_s": 0.5, "tokens_per_s": 2000.0}
    return row("rows", "two", 2, **{**facts, **changes})


def sides(tool: ModuleType, tmp_path: Path, *inputs: Path) -> list[str]:
    """Lines of the section, without padding, and what was left out."""
    status, page, markdown = report(tool, tmp_path, *inputs)
    assert status == 0
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    section = markdown.partition("## Estimated, simulated")[2].partition("\n## ")[0]
    left_out = [line for line in markdown.splitlines() if line.startswith("- left out: ")]
    return [re.sub(" +", " ", line) for line in [*section.splitlines(), *left_out]]
