"""An engine on the ranks of a spawned world, a step of it, and the memory that is left."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

from megatron_crnet.config.schema import Config, RecomputeConfig
from megatron_crnet.distributed.process_groups import initialize_parallel
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.planning.counters import LiveMemory
from tests.distributed.spawn import fresh_world
from tests.helpers import micro_batches, random_tokens

INVERSE = RecomputeConfig(strategy="inverse")
INVERSE_TOLERANCE = {"fp32": 1e-4, "bf16": 1 / 16}
"""Error of all gradients together under `inverse`, by dtype."""


def build_engine(config: Config) -> TrainEngine:
    """A model and its engine on this world's ranks; a collective call."""
    context = initialize_parallel(config)
    return TrainEngine(config, build_model_chunks(config), context)


def run_step(engine: TrainEngine, step: int = 0) -> float:
    """The passes of a step without the update; every sequence starts with token 0. The loss."""
    tokens, _ = random_tokens(engine.config, step)
    context = engine.context
    batches = micro_batches(engine.config, context.dp_rank, context.world_size, step)
    for batch in batches:
        batch["tokens"][:, 0] = 0
    return engine.forward_backward(batches, tokens.numel())


def close_engine(engine: TrainEngine) -> None:
    """Let go of it and of all groups; a collective call."""
    engine.context.heartbeat.close()
    engine.close()
    fresh_world()


def settled(memory: LiveMemory) -> int:
    """Bytes alive once no other thread has work left: gloo's lets go of a reduced tensor a moment after the call."""
    deadline, quiet = time.monotonic() + 60, 0
    while quiet < 3:
        assert time.monotonic() < deadline
        before = memory.current
        time.sleep(0.02)  # without Python's lock, for which a thread may wait to let go of a tensor
        quiet = quiet + 1 if memory.current == before and not _others_run() else 0
    return memory.current


def _others_run() -> bool:
    """Whether another thread of this process runs, or would on a machine that is not busy (Linux)."""
    own = str(threading.get_native_id())
    states = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            if task.name != own:
                states.append((task / "stat").read_text().rpartition(") ")[2][0])
    return "R" in states
