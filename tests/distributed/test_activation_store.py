"""What each key of DeepSpeed's `activation_checkpointing` section changes, observed in a pass of the real model."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator

from megatron_crnet.config.schema import RecomputeConfig
from megatron_crnet.planning.counters import LiveMemory
from tests.distributed.engines import build_engine, close_engine, settled
from tests.distributed.spawn import run_distributed
from tests.helpers import micro_batches, tiny_config

PARTITION = {"partition_activations": True}
SECTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "partition": PARTITION,
    "contiguous": {**PARTITION, "contiguous_memory_optimization": True, "number_checkpoints": 2},
    "observed": {"synchronize_checkpoint_boundary": True, "profile": True},
}


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a second pass did.

    Attributes:
        kept: bytes that the forward pass left behind, loss included.
        copies: bytes that every tensor-parallel rank would hold whole.
        segments: how many there are.
        synchronized: calls that waited for the device.
        timed: lines of DeepSpeed's timers.
    """

    kept: int
    copies: int
    segments: int
    synchronized: int
    timed: list[str]


def observe() -> dict[str, Seen]:
    return {name: _observe(section) for name, section in SECTIONS.items()}


def _observe(section: dict[str, Any]) -> Seen:
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": False}
    recompute = RecomputeConfig(strategy="replay", segment_length=2)
    deepspeed = {"activation_checkpointing": section} if section else {}
    config = dataclasses.replace(tiny_config({"num_layers": 6}, parallel), recompute=recompute, deepspeed=deepspeed)
    engine = build_engine(config)
    batch, block = micro_batches(config, 0, 2)[0], engine.chunks[0].decoder
    engine.chunks[0].token_losses(batch).sum().backward()
    printed, count, original = io.StringIO(), [0], get_accelerator().synchronize
    get_accelerator().synchronize = lambda *_: count.__setitem__(0, count[0] + 1)
    with LiveMemory() as memory, contextlib.redirect_stdout(printed):
        losses = engine.chunks[0].token_losses(batch)
        kept = settled(memory)
        losses.sum().backward()
    get_accelerator().synchronize = original
    tokens, h = batch["tokens"].numel(), config.model.hidden_size
    ranks = sum(sum(row.values()) for row in block.config.table.ranks if 0 not in row.values())
    starts = sum(3 * h if block.config.table.has_previous(segment.start) else h for segment in block.segments)
    close_engine(engine)
    return Seen(kept, 4 * tokens * (ranks + starts), len(block.segments), count[0], printed.getvalue().splitlines())


@pytest.fixture(scope="module")
def seen() -> dict[str, Seen]:
    return run_distributed(observe, 2)[0]


def test_partitions_keep_half_of_what_both_ranks_hold(seen: dict[str, Seen]) -> None:
    plain, partition = seen["nothing"], seen["partition"]
    assert plain.kept - partition.kept == plain.copies // 2


def test_contiguous_buffers_are_there_already_in_the_second_pass(seen: dict[str, Seen]) -> None:
    assert seen["contiguous"].kept < seen["partition"].kept - seen["nothing"].copies // 4


def test_every_pass_of_a_segment_is_synchronized_and_timed_on_demand(seen: dict[str, Seen]) -> None:
    observed, plain = seen["observed"], seen["nothing"]
    assert (plain.synchronized, plain.timed) == (0, [])
    # before and after, forward and backward
    assert observed.synchronized == 4 * observed.segments
    for timer in ("fwd", "bwd"):
        assert sum(timer in line for line in observed.timed) == observed.segments
