"""A step that is dropped changes no weight and no moment, and the steps after it are as if it had never been."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_crnet.config.schema import Config
from megatron_crnet.distributed.process_groups import initialize_parallel
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.engine.zero_state import ZeroState
from megatron_crnet.model.gpt import build_model_chunks
from tests.distributed.spawn import fresh_world, run_distributed
from tests.helpers import ARCHITECTURES, micro_batches, tiny_config

TP: dict[str, Any] = {"tensor_model_parallel_size": 2}
PP: dict[str, Any] = {"pipeline_model_parallel_size": 2}
EP: dict[str, Any] = {"expert_model_parallel_size": 2}
MOE = ARCHITECTURES["qwen3_moe"]
VPP: dict[str, Any] = {**PP, "virtual_pipeline_model_parallel_size": 2}
ROWS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1-bf16": {"stage": 1, "dtype": "bf16"},
    "zero3-bf16": {"stage": 3, "dtype": "bf16", "stage3_param_persistence_threshold": 0},
    "pp2-vpp2-zero1": {"stage": 1, "parallel": VPP},
    "galore-zero2-bf16": {"stage": 2, "dtype": "bf16", "galore_rank": 4},
    "ep2-zero1-bf16": {"stage": 1, "dtype": "bf16", "parallel": EP, "model": MOE},
}
MORE_ROWS: dict[str, dict[str, Any]] = {
    "zero0-bf16": {"stage": 0, "dtype": "bf16"},
    "ep2-zero0": {"stage": 0, "parallel": EP, "model": MOE},
    "ep2-zero1": {"stage": 1, "parallel": EP, "model": MOE},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2-bf16": {"stage": 2, "dtype": "bf16"},
    "zero3": {"stage": 3},
    "tp2-zero0": {"stage": 0, "parallel": TP},
    "tp2-zero3": {"stage": 3, "parallel": TP},
    "pp2-zero1-bf16": {"stage": 1, "dtype": "bf16", "parallel": PP},
    "galore-zero1-bf16": {"stage": 1, "dtype": "bf16", "galore_rank": 4},
    "galore-tp2-zero0": {"stage": 0, "parallel": TP, "galore_rank": 4},
    "galore-tp2-zero3": {"stage": 3, "parallel": TP, "galore_rank": 4},
}
HOW = ("none", "discarded", "not a number")
"""What becomes of the second of three steps."""


def row_config(
    stage: int,
    dtype: str = "fp32",
    parallel: dict[str, Any] | None = None,
    galore_rank: int | None = None,
    model: dict[str, Any] | None = None,
    **zero: Any,
) -> Config:
    section = {"zero_optimization": {"stage": stage, **zero}}
    model = {**(model or {}), **({"variant": "full_rank"} if galore_rank else {})}
    optimizer = {"name": "galore", "galore_rank": galore_rank} if galore_rank else {}
    return tiny_config(model, parallel, {"dtype": dtype, "global_batch_size": 4}, optimizer, section)


def everything(engine: TrainEngine, zero: ZeroState) -> list[Tensor]:
    found = [zero.read(p, kind) for p in zero.shards for kind in zero.kinds_of(p)]
    found += zero.galore.tensors if zero.galore is not None else []
    return [tensor.cpu().clone() for tensor in found if tensor is not None]


def train(config: Config, how: str) -> tuple[bool, list[float], list[Tensor]]:
    """Whether the second step changed nothing; learning rates; weights and moments after the third."""
    context = initialize_parallel(config)
    engine = TrainEngine(config, build_model_chunks(config), context)
    zero = engine.zero
    tokens = config.training.global_batch_size * config.training.seq_length

    def batches(step: int) -> list[dict[str, Tensor]]:
        return micro_batches(config, context.dp_rank, context.world_size, step)

    everything(engine, zero)  # as a checkpoint before the first update reads it
    engine.forward_backward(batches(0), tokens)
    rates = [engine.update()[1]]
    before = everything(engine, zero)
    if how == "none":
        engine.scheduler.step(1)
    else:
        spoilt = batches(1)
        if how == "not a number":
            spoilt[-1]["loss_mask"] = spoilt[-1]["loss_mask"] * float("inf")
        engine.forward_backward(spoilt, tokens)
        if how == "discarded":
            engine.discard()
        else:
            assert not torch.isfinite(torch.tensor(engine.update()[0]))
    unchanged = all(torch.equal(a, b) for a, b in zip(before, everything(engine, zero), strict=True))
    engine.forward_backward(batches(2), tokens)
    rates.append(engine.update()[1])
    after = everything(engine, zero)
    engine.close()
    context.heartbeat.close()
    fresh_world()
    return unchanged, rates, after


def drop_steps(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, tuple[bool, bool]]]:
    found: dict[str, dict[str, tuple[bool, bool]]] = {}
    for name, row in rows.items():
        config = row_config(**row)
        _, wanted_rates, wanted = train(config, "none")
        found[name] = {}
        for how in HOW[1:]:
            unchanged, rates, after = train(config, how)
            same = all(torch.equal(a, b) for a, b in zip(wanted, after, strict=True))
            found[name][how] = unchanged, same and rates == wanted_rates
    return found


@pytest.fixture(scope="module")
def dropped() -> list[dict[str, dict[str, tuple[bool, bool]]]]:
    return run_distributed(drop_steps, 2, ROWS)


@pytest.mark.parametrize("how", HOW[1:])
@pytest.mark.parametrize("name", ROWS)
def test_a_dropped_step_leaves_no_trace(name: str, how: str, dropped: list[dict[str, Any]]) -> None:
    assert [ranks[name][how] for ranks in dropped] == [(True, True)] * 2


@pytest.mark.long
def test_more_dropped_steps_leave_no_trace() -> None:
    for ranks in run_distributed(drop_steps, 2, MORE_ROWS, timeout_s=600):
        assert ranks == {name: dict.fromkeys(HOW[1:], (True, True)) for name in MORE_ROWS}
