"""What fails on one rank, in whatever way, is learned by all before the next collective call."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_crnet.checkpoint.manager import Checkpointer
from megatron_crnet.checkpoint.run_folder import RunFolders
from megatron_crnet.distributed.consensus import examine_together
from megatron_crnet.distributed.process_groups import initialize_parallel
from megatron_crnet.training import preflight
from megatron_crnet.utils.errors import CheckpointError, ConfigError, DataError
from tests.distributed.spawn import run_distributed
from tests.helpers import tiny_config


def fail_on_one() -> tuple[str, str, float]:
    started = time.monotonic()

    def examine() -> tuple[None, dict[str, str]]:
        if dist.get_rank() == 1:
            raise TypeError("an integer is wanted")
        return None, {}

    with pytest.raises((DataError, TypeError)) as at_start:
        examine_together(examine)

    def write() -> None:
        raise RecursionError("too deep")

    checkpointer = Checkpointer.__new__(Checkpointer)
    checkpointer.folder, checkpointer._group = Path("folder"), dist.new_group(backend="gloo")
    checkpointer._may_write = lambda: None
    with pytest.raises(CheckpointError) as saving:
        checkpointer._on_main(write)
    return str(at_start.value), str(saving.value), time.monotonic() - started


@pytest.mark.fault("B15")
def test_a_defect_on_one_rank_reaches_all_others() -> None:
    (other, saving, waited), (own, *same) = run_distributed(fail_on_one, 2)
    assert other == "rank 1 failed: TypeError: an integer is wanted"
    assert own == "an integer is wanted"
    assert saving == same[0]
    assert saving.startswith("cannot write a checkpoint into folder: RecursionError: too deep:")
    assert waited < 60


def no_memory_on_one() -> tuple[str, float]:
    config = tiny_config()
    context = initialize_parallel(config)

    def check_memory(*_: object) -> None:
        if dist.get_rank() == 1:
            raise ConfigError("cpu has 1 GiB")

    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "check_memory", check_memory)
        with pytest.raises(ConfigError) as caught:
            preflight._examine_all(config, context, RunFolders())
    context.heartbeat.close()
    return str(caught.value), time.monotonic() - started


@pytest.mark.fault("B15")
def test_a_node_with_less_memory_is_known_to_all_ranks_at_once() -> None:
    (other, waited), (own, _) = run_distributed(no_memory_on_one, 2)
    assert own == "cpu has 1 GiB"
    assert other == "rank 1 failed: cpu has 1 GiB"
    assert waited < 60
