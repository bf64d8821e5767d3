from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_crnet import liveness
from megatron_crnet.liveness import Heartbeat


def test_a_rank_that_no_longer_reports_is_named_gone_and_the_others_where_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.05)
    store = dist.HashStore()
    first, second, third = (Heartbeat(store, rank, 3) for rank in range(3))
    first.report("step 7")
    second.report("the checkpoint of step 6")
    third.report("step 7")
    while not store.check(["heartbeat/1", "heartbeat/2"]):
        pass
    third.close()
    line = first.whereabouts()
    assert line == "gone: rank 2; this is rank 0 at step 7; rank 1 at the checkpoint of step 6"
    for heartbeat in (first, second):
        heartbeat.close()
