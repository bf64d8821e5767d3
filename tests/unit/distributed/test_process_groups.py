from __future__ import annotations

import os

import pytest

from megatron_crnet.distributed.process_groups import keep_launch_order
from tests.helpers import tiny_config


@pytest.mark.parametrize(("tp", "before", "after"), [(1, None, None), (2, None, "1"), (2, "8", "8")])
def test_launches_keep_their_order_under_tensor_parallelism_unless_the_user_says_otherwise(
    tp: int, before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, before or "")
    if before is None:
        monkeypatch.delenv(name)
    keep_launch_order(tiny_config(parallel={"tensor_model_parallel_size": tp}))
    assert os.environ.get(name) == after
