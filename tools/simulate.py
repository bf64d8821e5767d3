"""Run one rank of a world of up to 4096 in this process, without memory and without peers, and count its step.

    python tools/simulate.py --config examples/llama2_7b.yaml --world-size 8 --rank 0

The real model, schedule and DeepSpeed engine, on PyTorch's fake tensors and fake process group. The estimate's figures
stand beside the counted ones. Any `--section.field value` of pretrain_crnet.py is taken, and:

    --world-size N    ranks of the simulated world
    --rank K          which of them this process is (default 0)
    --json            print the counted and the estimated figures as JSON instead; tools/scaling_report.py takes it

What a simulation can and cannot see: docs/planning.md.
"""

from __future__ import annotations

from megatron_crnet.utils.errors import ctrl_c_is_one_line

if __name__ == "__main__":
    ctrl_c_is_one_line()  # during the imports below as well

import contextlib
import dataclasses
import json
import sys
import time
from typing import Any

from megatron_crnet.config.loading import read_config
from megatron_crnet.config.options import only_usage, positive_integer, take_options
from megatron_crnet.config.schema import Config
from megatron_crnet.utils.duration import signs_of_life, spell
from megatron_crnet.utils.errors import reported, require

OPTIONS = {"--world-size": "1", "--rank": "0"}


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
            return f"building the model: {spell(seconds)}"
        left = (time.monotonic() - self._started) * (self.total - self.done) / max(self.done - 1, 1)
        ends = "time left not known yet" if self.done < 2 else f"about {spell(left)} left"
        ends = "the update follows" if self.done == self.total else ends
        return f"pass {self.done} of {self.total} of two steps, {spell(seconds)}; {ends}"


def compare(config: Config, world_size: int, rank: int) -> dict[str, Any]:
    """Counted and estimated figures of the rank."""
    from megatron_crnet.distributed import cpu_backend

    cpu_backend.install()
    from megatron_crnet.planning.estimate import estimate
    from megatron_crnet.planning.simulation import check_simulation, simulate

    check_simulation(config, world_size, rank)
    expected = estimate(config, world_size)
    # ranks count through tensor and data parallelism before they reach the next stage
    stage = expected.stages[rank // (world_size // len(expected.stages))]
    progress = Progress()
    with contextlib.redirect_stdout(sys.stderr), signs_of_life(progress.line):  # DeepSpeed may print
        return {"counted": simulate(config, world_size, rank, progress.count), "estimated": stage}


def tables(found: dict[str, Any]) -> list[str]:
    """Both side by side."""
    from megatron_crnet.planning.estimate_report import flow_rows, memory_table

    counted, estimated = found["counted"], found["estimated"]
    ratio = estimated.memory.total / counted.memory.total - 1
    same = sorted((f.group, f.kind, f.bytes) for f in counted.flows) == sorted(
        (f.group, f.kind, f.bytes) for f in estimated.flows
    )
    return [
        "memory, GiB",
        *memory_table({"counted": counted.memory, "estimated": estimated.memory}),
        f"  the estimate's peak differs by {ratio:+.1%}",
        f"operations: counted {counted.flops:.6e}, estimated {estimated.operations.total:.6e}",
        "volume, counted" + (" and estimated alike" if same else ""),
        *flow_rows(counted.flows),
        *([] if same else ["volume, estimated", *flow_rows(estimated.flows)]),
    ]


def run(argv: list[str]) -> int:
    """Simulate and print; returns the exit status."""
    options, rest = take_options(OPTIONS, [argument for argument in argv if argument != "--json"])
    rank = str(options["--rank"])
    require(rank.isdecimal(), f"--rank is {rank}, but must be an integer from 0: correct it")
    world_size = positive_integer("--world-size", str(options["--world-size"]))
    config = read_config(rest)
    found = compare(config, world_size, int(rank))
    if "--json" not in argv:
        print("\n".join(tables(found)))
        return 0
    from megatron_crnet.reporting.step_identity import identify_step
    from megatron_crnet.utils.environment import provenance

    record = {
        **provenance("simulation", [__file__, *argv]),
        "step": identify_step(config, world_size),
        "world_size": world_size,
        "rank": int(rank),
        **{name: dataclasses.asdict(figures) for name, figures in found.items()},
    }
    print(json.dumps(record, indent=1))
    return 0


def main(argv: list[str]) -> int:
    """Run; returns the exit status."""
    status = only_usage(str(__doc__), argv)
    return reported(lambda: run(argv)) if status is None else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
