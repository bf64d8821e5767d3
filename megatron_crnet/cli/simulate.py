"""Simulate one rank of a world of up to 4096 in this process, and count its step.

    %(prog)s --config examples/llama2_7b.yaml --world-size 8 --rank 0

The real model, schedule and DeepSpeed engine, on PyTorch's fake tensors and fake process group. The estimate's figures
stand beside the counted ones. What a simulation can and cannot see: docs/planning.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from functools import partial
from typing import Any

from megatron_crnet.cli.main import Call
from megatron_crnet.config.loading import ConfigParser
from megatron_crnet.config.options import positive_integer
from megatron_crnet.config.schema import Config
from megatron_crnet.utils.errors import require
from megatron_crnet.utils.progress import format_duration, periodic_lines


def build_parser(prog: str) -> ConfigParser:
    """The options."""
    parser = ConfigParser(prog=prog, description=__doc__, needs_model=True)
    count = partial(positive_integer, "--world-size")
    parser.add_argument("--world-size", type=count, default=1, metavar="N", help="ranks of the world (default: 1)")
    parser.add_argument("--rank", type=_rank, default=0, metavar="K", help="which of them this process is (default: 0)")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the counted and the estimated figures as JSON instead; crnet report takes it",
    )
    return parser


def _rank(text: str) -> int:
    require(text.isdecimal(), f"--rank is {text}, but must be an integer from 0: correct it")
    return int(text)


class Progress:
    """How many forward passes of micro-batches the simulation has made; each has a backward pass to go with it."""

    def __init__(self) -> None:
        self.done, self.total, self._started = 0, 0, 0.0

    def count(self, done: int, total: int) -> None:
        """One more."""
        self._started = self._started or time.monotonic()
        self.done, self.total = done, total

    def line(self, seconds: float) -> str:
        """For a person who waits, `seconds` after the start."""
        if not self.total:
            return f"building the model: {format_duration(seconds)}"
        left = (time.monotonic() - self._started) * (self.total - self.done) / max(self.done - 1, 1)
        ends = "time left not known yet" if self.done < 2 else f"about {format_duration(left)} left"
        ends = "the update follows" if self.done == self.total else ends
        return f"pass {self.done} of {self.total} of two steps, {format_duration(seconds)}; {ends}"


def compare(config: Config, world_size: int, rank: int) -> dict[str, Any]:
    """Counted and estimated figures of the rank."""
    from megatron_crnet.distributed import cpu_backend

    cpu_backend.install()
    from megatron_crnet.planning.estimate import estimate
    from megatron_crnet.planning.machines import SIMULATED
    from megatron_crnet.planning.simulation import check_simulation, simulate

    check_simulation(config, world_size, rank)
    expected = estimate(config, world_size, SIMULATED)
    # ranks count through tensor and data parallelism before they reach the next stage
    stage = expected.stages[rank // (world_size // len(expected.stages))]
    progress = Progress()
    with contextlib.redirect_stdout(sys.stderr), periodic_lines(progress.line):  # DeepSpeed may print
        return {"counted": simulate(config, world_size, rank, progress.count), "estimated": stage}


def tables(found: dict[str, Any]) -> list[str]:
    """Both side by side."""
    from megatron_crnet.planning.tables import memory_table, volume_rows

    counted, estimated = found["counted"], found["estimated"]
    ratio = estimated.memory.total / counted.memory.total - 1
    return [
        "memory, GiB",
        *memory_table({"counted": counted.memory, "estimated": estimated.memory}),
        f"  the estimate's peak differs by {ratio:+.1%}",
        f"operations: counted {counted.flops:.6e}, estimated {estimated.operations.total:.6e}",
        "volume, counted",
        *volume_rows(counted.flows),
        "volume, estimated",
        *volume_rows(estimated.flows),
    ]


def run(call: Call) -> int:
    """Simulate and print; returns the exit status."""
    options, config = build_parser(call.prog).read(call.argv)
    found = compare(config, options.world_size, options.rank)
    if not options.json:
        print("\n".join(tables(found)))
        return 0
    from megatron_crnet.reporting.step_identity import identify_step
    from megatron_crnet.utils.environment import run_metadata

    record = {
        **run_metadata("simulation", call.words),
        "step": identify_step(config, options.world_size),
        "world_size": options.world_size,
        "rank": options.rank,
        **{name: dataclasses.asdict(figures) for name, figures in found.items()},
    }
    print(json.dumps(record, indent=1))
    return 0
