from __future__ import annotations

import signal

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_crnet.distributed.agent import status_of

ABORTED, KILLED, CRASHED = -signal.SIGABRT, -signal.SIGKILL, 1


@pytest.mark.parametrize(
    ("nodes", "exit_code", "forwarded", "status"),
    [
        ("2", ABORTED, set(), 4),  # NCCL ends a rank whose peer of another node is gone: to be started again
        ("1:4", ABORTED, set(), 4),
        ("1", ABORTED, set(), 134),  # no other node can be to blame
        ("2", KILLED, set(), 137),
        ("2", CRASHED, set(), 1),
        ("2", -signal.SIGTERM, {signal.SIGTERM}, 75),
    ],
)
def test_the_status_is_that_of_the_first_rank_that_failed(
    nodes: str, exit_code: int, forwarded: set[int], status: int
) -> None:
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=exit_code, error_file="")
    assert status_of(ChildFailedError("train", {3: failure}), forwarded, nodes) == status
