"""Run metadata: the command, the machine and the versions that figures were measured with."""

from __future__ import annotations

import json
import os
import platform
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from megatron_crnet.utils.files import read_json_object, replace_text
from megatron_crnet.utils.versions import LIBRARIES, library_versions

RUN_FILE = "run.json"


def command_line(argv: list[str]) -> str:
    """The command of `sys.argv` as it can be pasted into a shell from the repository's root."""
    program = Path(argv[0])
    if program.name == "crnet":
        return shlex.join(["crnet", *argv[1:]])
    if program.name == "__main__.py":
        return shlex.join(["python", "-m", program.parent.name, *argv[1:]])
    root = Path(__file__).parents[2]
    name = str(program.resolve().relative_to(root)) if program.resolve().is_relative_to(root) else program.name
    return shlex.join(["python", name, *argv[1:]])


def machine() -> dict[str, Any]:
    """Processor, memory, GPUs and current load; no names of hosts or users."""
    import torch  # takes seconds, which `command_line` does not need

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": round(psutil.getloadavg()[0], 2),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python, of this project and of the libraries that decide its speed."""
    return {"python": platform.python_version(), **library_versions((*LIBRARIES, "numpy"))}


def run_metadata(kind: str, argv: list[str]) -> dict[str, Any]:
    """The head of a file of figures; `crnet report` recognizes them by `kind`."""
    return {"kind": kind, "command": command_line(argv), "machine": machine(), "versions": versions()}


def write_run_file(folder: Path, argv: list[str], world_size: int, **more: Any) -> None:
    """Write RUN_FILE for reports, and `more` for the next start; raises OSError if the folder cannot be written."""
    facts = {**run_metadata("run", argv), "world_size": world_size, **more}
    replace_text(folder / RUN_FILE, json.dumps(facts, indent=1) + "\n")


def read_run_file(folder: Path) -> dict[str, Any]:
    """The contents of RUN_FILE; empty if it cannot be read."""
    return read_json_object(folder / RUN_FILE)


def note_in_run_file(folder: Path, **facts: Any) -> None:
    """Update RUN_FILE, if there is one; errors of the disk are ignored."""
    with suppress(OSError):
        if known := read_run_file(folder):
            replace_text(folder / RUN_FILE, json.dumps({**known, **facts}, indent=1) + "\n")


def available_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
