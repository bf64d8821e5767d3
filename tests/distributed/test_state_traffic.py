"""What saving and loading a state send between replicas, and how often they open files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageReader

from megatron_crnet.checkpoint import weight_files
from megatron_crnet.checkpoint.storage import collect, fill, shared_reader, write
from megatron_crnet.engine.state_kinds import KINDS
from megatron_crnet.engine.zero import local_shape
from megatron_crnet.planning.counters import CommunicationCounter
from tests.distributed.engines import build_engine, close_engine, run_step
from tests.distributed.spawn import run_distributed
from tests.helpers import local_weights, tiny_config

ROWS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1-bf16": {"stage": 1, "dtype": "bf16"},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
}


def save_and_load(folder: str) -> dict[str, dict[str, Any]]:
    """By row: parameters, bytes that this rank sends to collect its state, and whether that is as by all-reduce."""
    found: dict[str, dict[str, Any]] = {}
    opened = 0
    read_metadata = HuggingFaceStorageReader.read_metadata

    def counted(self: HuggingFaceStorageReader) -> Any:
        nonlocal opened
        opened += 1
        return read_metadata(self)

    for name, row in ROWS.items():
        section = {"zero_optimization": {"stage": row["stage"]}}
        engine = build_engine(tiny_config(training={"dtype": row.get("dtype", "fp32")}, deepspeed_section=section))
        run_step(engine)
        engine.update()
        zero, weights = engine.zero, local_weights(engine)
        collect(zero, weights)  # learns once which replica has what
        with CommunicationCounter() as counter:
            boxes = collect(zero, weights)
        same = True
        for parameter in zero.shards:
            for kind in KINDS:
                mine = zero.shards[parameter]
                whole = torch.zeros(local_shape(parameter).numel())
                if mine is not None:
                    mine.cut(whole).copy_(mine.read(zero._tensor(parameter, mine.master, kind)))
                if engine.stage:
                    dist.all_reduce(whole)
                read = zero.read(parameter, kind)
                same = same and read is not None and torch.equal(read.flatten(), whole)
        target = Path(folder, name)
        write(target, boxes, dist.new_group(backend="gloo"))
        HuggingFaceStorageReader.read_metadata, opened = counted, 0  # type: ignore[method-assign]
        portion, weight_files.BYTES_AT_ONCE = weight_files.BYTES_AT_ONCE, 1
        fill(shared_reader(target), zero, weights, 1)
        HuggingFaceStorageReader.read_metadata, weight_files.BYTES_AT_ONCE = read_metadata, portion  # type: ignore[method-assign]
        found[name] = {
            "parameters": sum(local_shape(parameter).numel() for parameter in zero.shards),
            "sent": counter.total("send").bytes,
            "reduced": counter.total("all_reduce", "all_gather").bytes,
            "same": same,
            "opened": opened,
        }
        close_engine(engine)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_distributed(save_and_load, 2, str(tmp_path_factory.mktemp("traffic")))


@pytest.mark.fault("B24")
@pytest.mark.parametrize("name", ROWS)
def test_each_value_travels_at_most_once_to_the_rank_that_writes_it(name: str, found: list[dict[str, Any]]) -> None:
    """An all-reduce of every master and moment, as it was, counts as 24 bytes per parameter on each of the two ranks.

    Parts of one parameter may have both ranks as owners, which then send each other their slices of all of it.
    """
    ranks = [rank[name] for rank in found]
    assert all(rank["same"] for rank in ranks)
    assert all(rank["reduced"] == 0 for rank in ranks)
    bytes_of_state = 12 * ranks[0]["parameters"]
    sent = sum(rank["sent"] for rank in ranks)
    assert sent == 0 if name == "zero0" else 0 < sent <= bytes_of_state


@pytest.mark.fault("B23")
def test_the_headers_of_a_checkpoint_are_read_once_for_all_ranks_and_portions(found: list[dict[str, Any]]) -> None:
    assert [{name: row["opened"] for name, row in rank.items()} for rank in found] == [
        dict.fromkeys(ROWS, 1),
        dict.fromkeys(ROWS, 0),
    ]
