"""What grows with the number of ranks, counted in the real trainer on processes of this host, over gloo."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_crnet.utils.errors import require

STEPS, COUNTED = 4, 4
"""Steps of the run, and the one whose calls are counted: the checkpoint of the second one has been written by then."""
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
        self.before = (0, 0)
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

        class Looked(np.memmap):
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


def measure_scale(ranks: int, options: Sequence[str], port: int) -> list[Figures]:
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
