"""What grows with the number of ranks, counted in the real trainer on processes of this host, over gloo."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_crnet.reporting.rank_group import TRAINING, RankGroup

STEPS, COUNTED = 4, 4
"""Steps of the run, and the one whose calls are counted: the checkpoint of the second one has been written by then."""
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "all_gather", "barrier")
Figures = dict[str, int]


class Counts:
    """What this process does, from before the trainer to its last step."""

    def __init__(self) -> None:
        self.calls = self.world_calls = self.tokens = self.samples = 0
        self.before = (0, 0)
        self.read = _bytes_read()
        self.found: Figures = {}

    def install(self) -> None:
        """Wrap what is counted: functions of torch.distributed, numpy, Megatron-Core and the watchdog."""
        import numpy as np
        import torch.distributed as dist
        from megatron.core.datasets.gpt_dataset import GPTDataset
        from torch.distributed import distributed_c10d

        from megatron_crnet.distributed.watchdog import Heartbeat

        for name in COLLECTIVES:
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
            read = _bytes_read() - self.read
            self.found = {"token_bytes": self.tokens, "samples": self.samples, "other_bytes": read}
        elif step == COUNTED:
            self.found["sockets"] = _open_sockets()
            self.found["collectives"] = self.calls - self.before[0]
            self.found["world_calls"] = self.world_calls - self.before[1]
        self.before = (self.calls, self.world_calls)


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _open_sockets() -> int:
    links = (path.readlink() if os.path.lexists(path) else path for path in Path("/proc/self/fd").iterdir())
    return sum(str(link).startswith("socket:") for link in links)


def _rank(options: Sequence[str]) -> Iterator[Figures]:
    from megatron_crnet.config.loading import read_config
    from megatron_crnet.training.trainer import run_training

    config, counts = read_config(options), Counts()
    counts.install()
    run_training(config)
    yield counts.found


def measure_scale(ranks: int, options: Sequence[str], port: int) -> list[Figures]:
    """The figures of each rank.

    Raises:
        RankError: one failed.
    """
    # imported once: what ranks read at start is then data, and they share their memory
    group = RankGroup(_rank, options, processes=ranks, port=port, preload=TRAINING)
    try:
        found: list[Figures] = group.answers()
        return found
    finally:
        group.close()
