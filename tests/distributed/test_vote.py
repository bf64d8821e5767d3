"""What one rank knows is known to all by the loss's own all-reduce; micro-batches are progress."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_crnet.distributed.consensus import Vote
from megatron_crnet.distributed.watchdog import Heartbeat
from megatron_crnet.engine.schedule import loss_totals
from tests.distributed.engines import build_engine, run_step
from tests.distributed.spawn import run_distributed
from tests.helpers import tiny_config


def votes() -> list[tuple[tuple[float, float], list[bool]]]:
    """Losses and answers where nobody, rank 2, and ranks 0 and 2 say yes."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, create_gloo_process_groups=False)
    groups = len(dist.distributed_c10d._world.pg_map)
    rank, found = dist.get_rank(), []
    results = [{"loss_sum": torch.tensor(1.5 + rank // 2), "tokens": torch.tensor(4)}]
    for warned, due in ((set(), set()), ({2}, set()), ({2}, {0})):
        vote = Vote(lambda ranks=warned: rank in ranks, lambda ranks=due: rank in ranks)
        found.append((loss_totals(results, torch.device("cpu"), vote), vote.answers))
    found.append((loss_totals(results, torch.device("cpu")), []))
    assert len(dist.distributed_c10d._world.pg_map) == groups
    return found


@pytest.mark.fault("B7")
def test_all_ranks_learn_of_a_signal_to_one_with_the_loss_and_without_a_group_of_their_own() -> None:
    for found in run_distributed(votes, 4):
        totals, answers = zip(*found, strict=True)
        assert answers == ([False, False], [True, False], [True, True], [])
        assert set(totals) == {(4.0, 8.0)}


def marks_of_a_step(micro_batches: int) -> int:
    """How often this rank notes progress in the passes of a step."""
    marks: list[int] = []
    progress = Heartbeat.progress
    Heartbeat.progress = lambda heartbeat: marks.append(1) or progress(heartbeat)  # type: ignore[method-assign]
    engine = build_engine(tiny_config(training={"micro_batch_size": 1, "global_batch_size": micro_batches}))
    marks.clear()
    run_step(engine)
    return len(marks)


@pytest.mark.fault("B11")
def test_every_micro_batch_is_progress() -> None:
    (few,), (many,) = (run_distributed(marks_of_a_step, 1, count) for count in (2, 6))
    assert many - few == 2 * 4  # before and after each forward pass
