#!/usr/bin/env python3
"""Count what grows with the number of ranks: a few steps of the real trainer on N processes of this host, over gloo.

    python tools/measure_scale.py --ranks 64 --config examples/quickstart.yaml --training.micro_batch_size 1 \\
        --training.global_batch_size 64 --logging.output_dir /tmp/scale

Counts, of each process: open sockets after a checkpoint, collective calls of a step and of these the host's own (over
all ranks, on the host, beside the model's), bytes read of the data's token files, validation samples drawn and other
bytes read from the start to the first step. Any `--section.field value` of pretrain_crnet.py is taken; `train_steps` is
4. `--json FILE` writes the figures as well. Needs about 0.2 GiB of memory per rank.
"""

from __future__ import annotations

from megatron_crnet.utils.errors import ctrl_c_is_one_line

if __name__ == "__main__":
    ctrl_c_is_one_line()  # during the imports below as well

import multiprocessing
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_crnet.config.options import only_usage, positive_integer, take_options
from megatron_crnet.utils.errors import reported, require
from megatron_crnet.utils.record_file import check_record_file, write_record

STEPS, COUNTED = 4, 4
"""Steps of the run, and the one whose calls are counted: the checkpoint of the second one has been written by then."""
FIGURES = {
    "sockets": "open sockets",
    "collectives": "collective calls of a step",
    "world_calls": "of these over all ranks",
    "token_bytes": "bytes read of token files",
    "samples": "validation samples drawn at start",
    "other_bytes": "other bytes read at start",
}
Figures = dict[str, int]


class Never:
    """In the place of `Interruption`: a process that is measured takes no signals."""

    received = None

    def arm(self) -> None:
        """Nothing to note."""


class Counts:
    """What this process does, from before the trainer to its last step."""

    def __init__(self) -> None:
        self.calls = self.world_calls = self.tokens = self.samples = 0
        self.read = _bytes_read()
        self.found: Figures = {}

    def install(self) -> None:
        """Look over the shoulders of torch.distributed, numpy and the trainer."""
        import numpy as np
        import torch.distributed as dist
        from megatron.core.datasets.gpt_dataset import GPTDataset
        from torch.distributed import distributed_c10d

        from megatron_crnet.distributed.watchdog import Heartbeat

        for name in (
            "all_reduce",
            "all_gather_into_tensor",
            "reduce_scatter_tensor",
            "broadcast",
            "all_gather",
            "barrier",
        ):
            self._count_calls(dist, distributed_c10d, name)
        counts, draw, report = self, GPTDataset.__getitem__, Heartbeat.report

        class Looked(np.memmap):  # type: ignore[type-arg]
            def min(self, *args: Any, **options: Any) -> Any:
                counts.tokens += self.nbytes
                return super().min(*args, **options)

        np.memmap = Looked  # type: ignore[misc]

        def drawn(self: Any, number: int) -> Any:
            counts.samples += not counts.found
            return draw(self, number)

        GPTDataset.__getitem__ = drawn

        def reported_step(self: Any, doing: str, *args: Any, **options: Any) -> None:
            if step := re.fullmatch(r"step (\d+)", doing):
                counts._at(int(step.group(1)))
            report(self, doing, *args, **options)

        Heartbeat.report = reported_step  # type: ignore[method-assign]

    def _count_calls(self, dist: Any, implementation: Any, name: str) -> None:
        original = getattr(implementation, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.calls += 1
            group = options.get("group")
            self.world_calls += group is None or group.size() == dist.get_world_size()
            return original(*args, **options)

        setattr(dist, name, counted)

    def _at(self, step: int) -> None:
        """The trainer begins with a step."""
        if step == 1:
            self.found = {
                "token_bytes": self.tokens,
                "samples": self.samples,
                "other_bytes": _bytes_read() - self.read,
            }
        elif step == COUNTED:
            self.found["sockets"] = _open_sockets()
            self.found["collectives"] = self.calls - self.before[0]
            self.found["world_calls"] = self.world_calls - self.before[1]
        self.before = (self.calls, self.world_calls)


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _open_sockets() -> int:
    links = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_open(name)]
    return sum(link.startswith("socket:") for link in links)


def _is_open(name: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{name}")


def _rank(connection: Connection, options: Sequence[str], variables: dict[str, str]) -> None:
    os.environ.update(variables)
    try:
        from megatron_crnet.distributed import cpu_backend

        cpu_backend.install()
        import torch

        torch.set_num_threads(1)
        from megatron_crnet.config.loading import read_config
        from megatron_crnet.training.trainer import run_training

        config, counts = read_config(options), Counts()
        counts.install()
        run_training(config, interruption=Never())  # type: ignore[arg-type]
        connection.send(counts.found)
    except BaseException as error:
        connection.send(f"rank {variables['RANK']}: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
    connection.recv()
    os._exit(0)


def measure(ranks: int, options: Sequence[str], port: int) -> list[Figures]:
    """The figures of each rank."""
    context = multiprocessing.get_context("forkserver")
    # imported once: what ranks read at start is then data, and they share their memory
    context.set_forkserver_preload(["megatron_crnet.training.trainer", "torch.utils.tensorboard", "matplotlib.pyplot"])
    ends, processes = [], []
    for rank in range(ranks):
        mine, theirs = context.Pipe()
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        process = context.Process(target=_rank, args=(theirs, options, variables), daemon=True)
        process.start()
        theirs.close()  # held open here, it would keep the end of a rank that died from being seen
        ends.append(mine)
        processes.append(process)
    try:
        found = [_answer(rank, end) for rank, end in enumerate(ends)]
    finally:
        for process in processes:
            process.kill()
            process.join()
    problems = [text for text in found if isinstance(text, str)]
    require(not problems, problems[0] if problems else "")
    return found


def _answer(rank: int, end: Connection) -> Any:
    """The figures of a rank, or what is wrong with it."""
    try:
        return end.recv()
    except EOFError:
        return f"rank {rank} died without a word, for want of memory perhaps: use fewer --ranks"


def table(found: list[Figures]) -> str:
    """The figures as Markdown: rank 0's, the median and the largest of the others."""
    lines = [
        f"| of each of {len(found)} ranks | rank 0 | median of the others | largest |",
        "| --- | --- | --- | --- |",
    ]
    for key, name in FIGURES.items():
        first, *others = [figures[key] for figures in found]
        others = others or [first]
        lines.append(f"| {name} | {first:,} | {statistics.median_low(others):,} | {max(others):,} |")
    return "\n".join(lines)


def run(argv: list[str]) -> int:
    """Count and print; returns the exit status."""
    own, rest = take_options({"--ranks": "8", "--port": "29511", "--json": None}, argv)
    ranks, port = (positive_integer(name, own[name] or "") for name in ("--ranks", "--port"))
    target = Path(own["--json"]) if own["--json"] else None
    check_record_file(target)
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "training.train_steps": STEPS,
            "training.eval_interval": 0,
            "checkpoint.save_interval": 2,
            "logging.log_interval": 1,
            "logging.sample_tokens": 0,
            "optimizer.lr_warmup_steps": 1,
            "checkpoint.dir": folder,
        }
        found = measure(ranks, [*rest, *(f"--{name}={value}" for name, value in changes.items())], port)
    print(table(found))
    if target is not None:
        from megatron_crnet.utils.environment import provenance

        write_record(target, {**provenance("scale", [__file__, *argv]), "ranks": found})
    return 0


def main(argv: list[str]) -> int:
    """Run; returns the exit status."""
    status = only_usage(str(__doc__), argv)
    return reported(lambda: run(argv)) if status is None else status


if __name__ == "__main__":
    # a process that starts anew imports this file again
    sys.exit(main(sys.argv[1:]))
