"""What one rank alone cannot read or copy ends loading or saving on every rank, in one line and at once."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageReader

from megatron_crnet.checkpoint import storage
from megatron_crnet.checkpoint.directory import checkpoints
from megatron_crnet.checkpoint.manager import Checkpointer, newest_complete
from megatron_crnet.checkpoint.train_state import TrainingState
from megatron_crnet.config.schema import CheckpointConfig
from megatron_crnet.utils.errors import CheckpointError
from tests.distributed.engines import build_engine, close_engine
from tests.distributed.spawn import run_distributed
from tests.helpers import tiny_config

STAGES = (0, 3)


def unreadable(self: Any, plan: Any, planner: Any) -> None:
    raise PermissionError(13, "Permission denied", "shard-00002")


def only_random_states(self: Any, plan: Any, planner: Any) -> Any:
    if any(item.dest_index.fqn.startswith("random.") for item in plan.items):
        unreadable(self, plan, planner)
    return READ(self, plan, planner)


def no_state(path: Path) -> Any:
    raise PermissionError(13, "Permission denied", path.name)


READ = HuggingFaceStorageReader.read_data
BREAKS: dict[str, tuple[Any, str, Any]] = {
    "tensors": (HuggingFaceStorageReader, "read_data", unreadable),
    "random states": (HuggingFaceStorageReader, "read_data", only_random_states),
    "state": (Path, "read_text", no_state),
}


def headers_opened(folder: str) -> int:
    """How often this rank reads headers from the search for a checkpoint to its last tensor; a collective call."""
    opened = 0
    read_metadata = HuggingFaceStorageReader.read_metadata

    def counted(self: HuggingFaceStorageReader) -> Any:
        nonlocal opened
        opened += 1
        return read_metadata(self)

    config = dataclasses.replace(tiny_config(), checkpoint=CheckpointConfig(dir=folder))
    engine = build_engine(config)
    checkpointer = Checkpointer(config, engine)
    checkpointer.save(TrainingState(1))
    checkpointer.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HuggingFaceStorageReader, "read_metadata", counted)
        found, _ = newest_complete(checkpoints(checkpointer.folder))
        assert found is not None
        checkpointer.load(found)
    assert checkpointer.changed_layout is None, "random states were read as well"
    close_engine(engine)
    return opened


def load_with_one_rank_that_cannot(folder: str) -> dict[str, tuple[str, str, float]]:
    """Kind and message of the error, and seconds that it took, by what is broken on rank 1 alone."""
    found = {}
    for stage in STAGES:
        config = dataclasses.replace(
            tiny_config(deepspeed_section={"zero_optimization": {"stage": stage}}),
            checkpoint=CheckpointConfig(dir=f"{folder}/{stage}"),
        )
        engine = build_engine(config)
        checkpointer = Checkpointer(config, engine)
        checkpointer.save(TrainingState(1))
        saved = checkpointer.wait()
        assert saved is not None
        for name, (owner, attribute, broken) in BREAKS.items():
            started = time.monotonic()
            with pytest.MonkeyPatch.context() as patch:
                if dist.get_rank() == 1:
                    patch.setattr(owner, attribute, broken)
                try:
                    checkpointer.load(saved)
                    outcome = "loaded", ""
                except Exception as error:
                    outcome = type(error).__name__, str(error)
            found[f"{name}, stage {stage}"] = (*outcome, time.monotonic() - started)
            in_step = torch.ones(1)
            dist.all_reduce(in_step)
            assert in_step == 2
        assert checkpointer.load(saved).step == 1
        close_engine(engine)
    return found


@pytest.mark.fault("B15")
def test_what_one_rank_cannot_read_is_an_error_on_every_rank(tmp_path: Path) -> None:
    other, own = run_distributed(load_with_one_rank_that_cannot, 2, str(tmp_path))
    for name in own:
        (kind, message, waited), (own_kind, own_message, _) = other[name], own[name]
        assert (kind, own_kind) == ("CheckpointError", "CheckpointError"), name
        file = "state.json" if name.startswith("state") else "shard-00002"
        assert own_message.endswith(f"Permission denied: '{file}'): use another one"), own_message
        assert message == f"rank 1 failed: {own_message}", name
        assert waited < 60, name


def save_with_one_rank_that_cannot(folder: str) -> tuple[str, float]:
    config = dataclasses.replace(
        tiny_config(deepspeed_section={"zero_optimization": {"stage": 1}}), checkpoint=CheckpointConfig(dir=folder)
    )
    engine = build_engine(config)
    checkpointer = Checkpointer(config, engine)
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:

            def no_room(*_: Any) -> None:
                raise MemoryError("no room")

            patch.setattr(storage, "_box", no_room)
        checkpointer.save(TrainingState(1))
        with pytest.raises(CheckpointError) as caught:
            checkpointer.wait()
    waited = time.monotonic() - started
    checkpointer.save(TrainingState(2))
    checkpointer.wait()
    found, _ = newest_complete(checkpoints(Path(folder)))
    assert found == Path(folder, "step_00000002")
    close_engine(engine)
    return str(caught.value), waited


@pytest.mark.fault("B15")
def test_what_one_rank_cannot_copy_is_an_error_of_this_checkpoint_alone_on_every_rank(tmp_path: Path) -> None:
    (message, waited), (own, _) = run_distributed(save_with_one_rank_that_cannot, 2, str(tmp_path))
    assert message == own
    assert "rank 1 cannot write a checkpoint into" in message
    assert "was not copied: MemoryError: no room" in message
    assert waited < 60
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".partial")] == []


@pytest.mark.fault("B23")
def test_headers_are_read_once_by_rank_0_from_the_search_to_the_random_states(tmp_path: Path) -> None:
    assert run_distributed(headers_opened, 2, str(tmp_path)) == [1, 0]
