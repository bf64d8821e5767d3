"""ZeRO 0 to 3 on two data-parallel ranks: loss, gradient norm, every gradient and the updated weights."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
from deepspeed.runtime.zero import parameter_offload

from megatron_crnet.config.schema import RecomputeConfig
from tests.distributed.engines import build_engine, close_engine, run_step
from tests.distributed.spawn import fresh_world, run_distributed
from tests.helpers import ARCHITECTURES, Errors, compare_with_reference, tiny_config

STAGES = (0, 1, 2, 3)
DTYPES = ("fp32", "bf16")
# what bf16 gives here over three steps: every weight and activation is rounded to 8 bits (4e-3), and the worst
# single weight's gradient is that of a small one; a factor of two anywhere would be far outside
BF16_BOUNDS = Errors(loss=1e-2, grad_norm=5e-2, gradients=0.4, parameters=3e-2)


def _rows() -> dict[tuple[int, str], Errors]:
    rows = {}
    for stage, dtype in product(STAGES, DTYPES):
        config = tiny_config(training={"dtype": dtype}, deepspeed_section={"zero_optimization": {"stage": stage}})
        rows[stage, dtype] = compare_with_reference(config)
        fresh_world()
    return rows


@pytest.fixture(scope="module")
def errors() -> dict[tuple[int, str], Errors]:
    return run_distributed(_rows, 2)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_fp32_equals_plain_training_to_rounding(errors: dict[tuple[int, str], Errors], stage: int) -> None:
    assert errors[stage, "fp32"].worst() < 1e-5, errors[stage, "fp32"]


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_stays_within_what_bf16_gives(errors: dict[tuple[int, str], Errors], stage: int) -> None:
    found = errors[stage, "bf16"]
    for name in ("loss", "grad_norm", "gradients", "parameters"):
        assert getattr(found, name) < getattr(BF16_BOUNDS, name), found


TOP = {
    "comms_logger": {"enabled": True, "verbose": True, "debug": True, "prof_all": False, "prof_ops": ["all_reduce"]},
    "dump_state": True,
    "memory_breakdown": True,
    "wall_clock_breakdown": True,
    "timers": {"throughput": {"enabled": True, "synchronized": False}},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "flops_profiler": {"enabled": False},
    "aio": {"block_size": 1048576, "queue_depth": 8},
}
SHARDED = {
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "use_multi_rank_bucket_allreduce": False,
    "allgather_partitions": False,
    "allgather_bucket_size": 100,
    "reduce_bucket_size": 600,
    "ignore_unused_parameters": False,
    "enable_sanity_checks": True,
}
GATHERED = {
    "memory_efficient_linear": False,
    "override_module_apply": False,
    "log_trace_cache_warnings": True,
    "sub_group_size": 1000,
    "zero_hpz_partition_size": 2,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_use_all_reduce_for_fetch_params": True,
    "stage3_allgather_sequential": True,
    "stage3_gather_16bit_weights_on_model_save": True,
}
UNUSUAL = [
    {"stage": 1, **SHARDED},
    {"stage": 2, **SHARDED},
    {"stage": 2, "overlap_comm": True, "reduce_scatter": True},
    {"stage": 3, **SHARDED, **GATHERED},
    {"stage": 3, "overlap_comm": True},
]


def _unusual() -> list[float]:
    found = []
    for zero in UNUSUAL:
        found.append(compare_with_reference(tiny_config(deepspeed_section={**TOP, "zero_optimization": zero})).worst())
        fresh_world()
    return found


@pytest.mark.long
@pytest.mark.fault("F4")
def test_every_allowed_key_of_deepspeed_trains_exactly_at_another_value_than_its_default() -> None:
    assert max(run_distributed(_unusual, 2)[0]) < 1e-5


def _boundary_after_an_error(stage: int) -> bool:
    engine = build_engine(
        tiny_config(training={"micro_batch_size": 2}, deepspeed_section={"zero_optimization": {"stage": stage}})
    )
    (chunk,) = engine.scheduled

    def fail(*_: object, **__: object) -> None:
        assert not engine.deepspeed.is_gradient_accumulation_boundary(), "not the last micro-batch"
        raise MemoryError("as if there was no room")

    chunk.call = fail
    with pytest.raises(MemoryError):
        run_step(engine)
    return bool(engine.deepspeed.is_gradient_accumulation_boundary())


@pytest.mark.fault("B20")
def test_an_error_among_the_micro_batches_puts_the_accumulation_boundary_back() -> None:
    assert run_distributed(_boundary_after_an_error, 1, 2) == [True]


READERS = [
    *((model, "none") for model in ({}, *ARCHITECTURES.values())),
    *((ARCHITECTURES["qwen3"], strategy) for strategy in ("replay", "full")),
]


def _found_while_training() -> list[Any]:
    """Weights that DeepSpeed had to find by itself, because they are read within another module's call."""
    found: list[Any] = []
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    with patch.object(parameter_offload, "register_external_parameter", lambda module, _: found.append(type(module))):
        for model, strategy in READERS:
            config = tiny_config(model=model, deepspeed_section={"zero_optimization": zero})
            engine = build_engine(dataclasses.replace(config, recompute=RecomputeConfig(strategy=strategy)))
            run_step(engine)
            close_engine(engine)
    return found


def test_every_weight_is_gathered_with_the_module_that_reads_it() -> None:
    """One that is found after the passes that DeepSpeed traces ends the run, as after a bad step of a resumed one."""
    assert run_distributed(_found_while_training, 2)[0] == []
