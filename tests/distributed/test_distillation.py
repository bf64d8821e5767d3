"""Distillation in every layout, ZeRO stage and recomputation strategy against its page of plain PyTorch."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from megatron_crnet.config.schema import Config, RecomputeConfig
from megatron_crnet.distributed.process_groups import initialize_parallel
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.model.gpt import build_model_chunks
from tests.distributed.engines import INVERSE_TOLERANCE, close_engine
from tests.distributed.layouts import FP32_BOUND, Sizes, check, measure, shortened
from tests.distributed.spawn import run_distributed
from tests.distributed.test_layouts import DOCUMENTS, EP, GPT2, MOE, PARTITION_EVERYTHING, QWEN3
from tests.helpers import (
    PADDED_GROUPED,
    Errors,
    micro_batches,
    random_mask,
    random_teacher,
    tiny_config,
)

BOTH = {"kd_alpha": 3.0, "kd_beta": 0.5}


@dataclass(frozen=True)
class Row(Sizes):
    """Sizes of parallelism, the model, and the losses' weights."""

    recompute: str = "none"
    parallel: dict[str, Any] = field(default_factory=dict, hash=False)
    weights: dict[str, float] = field(default_factory=lambda: BOTH, hash=False)

    def config(self) -> Config:
        config = tiny_config(
            self.model,
            {**self.parallel_section, **self.parallel},
            {"dtype": self.dtype, "global_batch_size": self.sequences},
            deepspeed_section=self.deepspeed_section,
            data=self.data,
            distillation={"teacher": "of the test", **self.weights},
        )
        return dataclasses.replace(config, recompute=RecomputeConfig(strategy=self.recompute))


ON_TWO = [
    Row(zero=1),
    Row(zero=3, recompute="replay", keys=PARTITION_EVERYTHING),
    Row(tp=2, model=PADDED_GROUPED, weights={"kd_alpha": 2.0}, data=DOCUMENTS),
    Row(model={"variant": "low_rank"}, weights={"kd_alpha": 0.0, "kd_beta": 1.0}),
    Row(pp=2, zero=1, model=GPT2),
    Row(zero=1, model=MOE, parallel=EP, recompute="replay"),
    Row(tp=2, zero=1, dtype="bf16", recompute="full"),
]
ON_TWO = shortened(ON_TWO)
MORE_ON_TWO = [
    Row(tp=2, zero=3, recompute="full"),
    Row(tp=2, recompute="inverse"),
    Row(pp=2, vpp=2, zero=1, recompute="replay"),
    Row(tp=2, sp=False, recompute="replay"),
    Row(zero=3, dtype="bf16", keys=PARTITION_EVERYTHING),
    Row(tp=2, model=MOE, parallel=EP),
    Row(pp=2, zero=1, model=MOE, recompute="full"),
    Row(zero=3, model={**MOE, "variant": "low_rank"}),
    Row(zero=1, model={**MOE, "variant": "relora"}, parallel=EP),
    *(Row(zero=zero) for zero in (0, 2)),
    Row(tp=2),
    Row(tp=2, zero=1, model={"variant": "cola"}),
    Row(zero=1, model={"variant": "full_rank"}),
]
ON_FOUR = [
    Row(tp=2, zero=2),
    Row(tp=2, zero=3, keys=PARTITION_EVERYTHING),
    Row(tp=2, sp=False, zero=1),
    Row(tp=2, pp=2, data=DOCUMENTS),
    *(Row(tp=2, pp=2, zero=1, model=model, weights={"kd_alpha": 2.0}) for model in (GPT2, QWEN3)),
    Row(tp=2, pp=2, vpp=2, zero=1, weights={"kd_alpha": 2.0}),
    Row(pp=4, zero=1, dtype="bf16"),
    *(
        Row(tp=tp, pp=pp, zero=1, recompute=recompute, model={"variant": variant})
        for (tp, pp, recompute), variant in itertools.product(
            ((2, 1, "replay"), (1, 2, "full")), ("crnet", "full_rank", "low_rank", "cola", "relora")
        )
    ),
]


def check_row(row: Row, errors: Errors) -> None:
    check(row.dtype, errors, fp32=FP32_BOUND if row.recompute != "inverse" else INVERSE_TOLERANCE["fp32"])


@pytest.fixture(scope="module")
def two() -> list[Errors]:
    return run_distributed(measure, 2, ON_TWO, timeout_s=900)[0]


@pytest.mark.parametrize("index", range(len(ON_TWO)), ids=[str(row) for row in ON_TWO])
def test_two_ranks(index: int, two: list[Errors]) -> None:
    check_row(ON_TWO[index], two[index])


@pytest.mark.long
@pytest.mark.parametrize(("world_size", "rows"), [(2, MORE_ON_TWO), (4, ON_FOUR)], ids=["two", "four"])
def test_more_layouts(world_size: int, rows: list[Row]) -> None:
    for row, errors in zip(rows, run_distributed(measure, world_size, rows, timeout_s=1500)[0], strict=True):
        check_row(row, errors)


def frozen(row: Row) -> None:
    """Train; the teacher's weights stay the same bits, and neither DeepSpeed nor a checkpoint knows them."""
    config = row.config()
    context = initialize_parallel(config)
    _, teacher = random_teacher(config)
    assert teacher is not None
    engine = TrainEngine(config, build_model_chunks(config), context, teacher)
    assert engine.distillation is not None
    weights = engine.distillation.weights
    before = [weight.clone() for weight in weights]
    known = {id(p) for p in engine.deepspeed.module.parameters()} | {id(w.parameter) for w in engine.weights}
    for step in range(2):
        batches = micro_batches(config, context.dp_rank, context.world_size, step)
        engine.forward_backward(batches, int(random_mask(config, step).sum()))
        engine.update()
    for weight, value in zip(weights, before, strict=True):
        assert torch.equal(weight, value)
        assert weight.grad is None
        assert not weight.requires_grad
        assert id(weight) not in known
        assert not hasattr(weight, "ds_id"), "ZeRO-3 has not partitioned it"
    assert not any(weight.shape[0] == config.model.vocab_size for weight in weights[1:]), "no output layer is held"
    close_engine(engine)


def test_the_teacher_is_frozen_and_nobody_elses() -> None:
    run_distributed(frozen, 1, Row(zero=3, weights={"kd_alpha": 1.0}, keys=PARTITION_EVERYTHING))
