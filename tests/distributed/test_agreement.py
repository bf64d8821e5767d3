"""What fails on one rank, in whatever way, is learned by all before the next collective call."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_crnet.checkpoint.manager import Checkpointer
from megatron_crnet.distributed.consensus import examine_together
from megatron_crnet.utils.errors import CheckpointError, DataError
from tests.distributed.spawn import run_distributed


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
    with pytest.raises(CheckpointError) as saving:
        checkpointer._on_main(write)
    return str(at_start.value), str(saving.value), time.monotonic() - started


@pytest.mark.fault("B15")
def test_a_defect_on_one_rank_reaches_all_others() -> None:
    (other, saving, waited), (own, *same) = run_distributed(fail_on_one, 2)
    assert other == "rank 1 stopped at start: TypeError: an integer is wanted"
    assert own == "an integer is wanted"
    assert saving == same[0]
    assert saving.startswith("cannot write a checkpoint into folder: RecursionError: too deep:")
    assert waited < 60
