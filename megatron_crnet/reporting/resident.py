"""Peak resident memory of real training steps, one process for each recomputation strategy."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from megatron_crnet.config.schema import Config
from megatron_crnet.distributed.process_groups import initialize_parallel
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.planning.counted_step import synthetic_batch
from megatron_crnet.utils.errors import require


def resident(configuration: Sequence[str]) -> list[dict[str, Any]]:
    """Peak resident memory of a process that trains two steps, for each strategy.

    Args:
        configuration: words of a command line that define it.
    """
    found = []
    for strategy in ("none", "replay", "inverse", "full"):
        command = [sys.executable, "-m", "megatron_crnet", "measure-recompute", *configuration]
        command += ["--recompute.strategy", strategy, "--resident-of", strategy]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        require(done.returncode == 0, f"the process of strategy {strategy} failed: {done.stderr.strip()[-300:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def resident_of(config: Config) -> dict[str, Any]:
    """Train two steps on random tokens in this process. Returns its memory before and at the peak."""
    context = initialize_parallel(config)
    engine = TrainEngine(config, build_model_chunks(config), context)
    batch = synthetic_batch(config, context.device)
    batch["tokens"] = batch["labels"] = tokens = torch.randint_like(batch["tokens"], config.model.vocab_size)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for _ in range(2):
        engine.forward_backward([batch], tokens.numel())
        engine.update()
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    name = config.recompute.strategy
    return {"name": name, "before_kib": before, "peak_kib": peak, "seconds": seconds}
