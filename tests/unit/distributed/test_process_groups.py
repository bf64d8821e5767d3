from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from megatron_crnet.distributed.launcher import keep_launch_order
from megatron_crnet.distributed.process_groups import can_leave_groups, local_rank_variables
from megatron_crnet.utils.errors import ConfigError, PeerLostError


@pytest.mark.parametrize(("tp", "before", "after"), [(1, None, None), (2, None, "1"), (2, "8", "8")])
def test_launches_keep_their_order_under_tensor_parallelism_unless_the_user_says_otherwise(
    tp: int, before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, before or "")
    if before is None:
        monkeypatch.delenv(name)
    keep_launch_order(tp)
    assert os.environ.get(name) == after


@pytest.mark.parametrize("under_mpirun", [False, True])
def test_deepspeed_is_told_the_device_that_was_taken(under_mpirun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --gpus-per-task=1` shows the process of local rank 3 one GPU, which is number 0 to it."""
    mpirun = "OMPI_COMM_WORLD_LOCAL_RANK"
    monkeypatch.delenv(mpirun, raising=False)
    if under_mpirun:
        monkeypatch.setenv(mpirun, "3")  # DeepSpeed asserts that it equals LOCAL_RANK
    names = ["LOCAL_RANK", *([mpirun] if under_mpirun else [])]
    assert local_rank_variables(3, torch.device("cuda", 0)) == dict.fromkeys(names, "0")
    assert local_rank_variables(3, torch.device("cuda", 5)) == dict.fromkeys(names, "5")
    assert local_rank_variables(3, torch.device("cpu")) == dict.fromkeys(names, "3")


@pytest.mark.parametrize(
    ("backend", "ranks", "error", "leaves"),
    [
        ("gloo", 2, ConfigError("all ranks say so"), True),
        ("gloo", 2, PeerLostError("a peer is gone"), False),
        ("gloo", 2, ValueError("a defect"), False),
        ("gloo", 1, ValueError("a defect"), True),
        ("nccl", 1, ValueError("a defect"), True),
        # leaving NCCL's groups waits for the other ranks, and a compiler may have failed on this one alone
        ("nccl", 2, ConfigError("perhaps this rank alone"), False),
    ],
)
def test_no_rank_waits_for_others_at_an_error(
    backend: str, ranks: int, error: Exception, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    assert can_leave_groups(error) is leaves
