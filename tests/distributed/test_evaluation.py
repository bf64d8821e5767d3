"""An evaluation that fails on one rank is given up by all of them, also where a pass needs them all."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_crnet.training.evaluation import _totals
from tests.distributed.engines import build_engine, close_engine
from tests.distributed.spawn import run_distributed
from tests.helpers import ARCHITECTURES, micro_batches, tiny_config

MOE = ARCHITECTURES["qwen3_moe"]
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alike": ({}, {}),
    "ZeRO-3": ({}, {"stage": 3, "stage3_param_persistence_threshold": 0}),
    "tensor-parallel": ({"tensor_model_parallel_size": 2}, {}),
    "stages": ({"pipeline_model_parallel_size": 2}, {"stage": 1}),
    "experts over replicas": ({"expert_model_parallel_size": 2}, {}),
}


def evaluate(fails: bool) -> dict[str, tuple[int, list[str]]]:
    """By layout, batches whose losses were added up, and this rank's warnings."""
    found = {}
    for name, (parallel, zero) in LAYOUTS.items():
        section = {"zero_optimization": zero} if zero else {}
        engine, warnings = build_engine(tiny_config(MOE, parallel, deepspeed_section=section)), io.StringIO()
        context, config = engine.context, engine.config

        def batches(*_: object) -> Iterator[list[dict[str, Any]]]:
            for step in range(3):
                if fails and step == 1 and dist.get_rank() == 1:
                    raise OSError("as if a disk was gone")
                yield micro_batches(config, context.dp_rank, context.world_size, step)  # noqa: B023

        trainer: Any = SimpleNamespace(
            **{"state": SimpleNamespace(step=5), "wants_stop": lambda: False, "batches": batches, "context": context},
            **{"engine": engine, "preflight": SimpleNamespace(config=config, context=context)},
        )
        with redirect_stderr(warnings):
            totals = _totals(trainer, "validation", None, 3, to_the_end=True)
        assert totals is not None
        assert not fails or engine.evaluate(micro_batches(config, context.dp_rank, context.world_size))[1] > 0
        found[name] = len(totals), warnings.getvalue().splitlines()
        close_engine(engine)
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_a_batch_that_one_rank_cannot_read_ends_the_evaluation_everywhere(fails: bool) -> None:
    first, second = run_distributed(evaluate, 2, fails)
    for name in LAYOUTS:
        assert first[name] == (0 if fails else 3, [])
        assert second[name][0] == (0 if fails else 3)
        assert [("as if a disk was gone" in line) for line in second[name][1]] == [True] * fails
