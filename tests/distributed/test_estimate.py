"""The estimate against a step that really runs on gloo ranks, and against one that is simulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megatron_crnet.config.distillation_section import DistillationConfig
from megatron_crnet.config.loading import load_config
from megatron_crnet.config.positions import METHODS, head_width, position_table
from megatron_crnet.config.schema import VARIANTS, Config, RecomputeConfig
from megatron_crnet.distributed.process_groups import initialize_parallel
from megatron_crnet.planning.counted_step import count_step
from megatron_crnet.planning.counters import OperationCounter
from megatron_crnet.planning.estimate import StageEstimate, estimate
from megatron_crnet.planning.machines import SIMULATED as UNFUSED
from megatron_crnet.planning.profile import CommVolume, Memory, StepProfile
from megatron_crnet.planning.simulation import simulate
from tests.distributed.spawn import fresh_world, run_distributed
from tests.helpers import ARCHITECTURES, tiny_config

# wide enough that activations and state weigh as in a real model, and DeepSpeed's buckets are not everything
MODEL = {"hidden_size": 64, "ffn_hidden_size": 160, "vocab_size": 256, "rank": 16, "num_layers": 4}
GPT2 = {**ARCHITECTURES["gpt2"], "max_position_embeddings": 64}
QWEN3 = {**ARCHITECTURES["qwen3"], "kv_channels": 24}
PADDED = {"ffn_hidden_size": 157, "rank": 31}  # 2 x 80 and 32; 160 on one rank
TRAINING = {"seq_length": 64, "micro_batch_size": 2, "global_batch_size": 8}
TP = {"tensor_model_parallel_size": 2}
PP = {"pipeline_model_parallel_size": 2}
VPP = {**PP, "virtual_pipeline_model_parallel_size": 2}
REPLAY, FULL = RecomputeConfig(strategy="replay"), RecomputeConfig(strategy="full")
INVERSE = RecomputeConfig(strategy="inverse", inverse_tolerance=0.1)  # wide, so that the guard adds nothing


# of 137,301 parameters: few stay between their uses, and gathering ahead stops now and then
TIGHT = {
    "stage3_prefetch_bucket_size": 5_000,
    "stage3_max_live_parameters": 40_000,
    "stage3_max_reuse_distance": 20_000,
    "stage3_param_persistence_threshold": 100,
}
WIDE = {**TIGHT, "stage3_prefetch_bucket_size": 20_000, "stage3_max_live_parameters": 60_000}
NOTHING_STAYS = {
    **TIGHT,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
}
BY_MODEL = {"reduce_bucket_size": None}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def row(
    dtype: str,
    stage: int,
    parallel: dict[str, Any] | None = None,
    recompute: Any = None,
    options: Mapping[str, Any] | None = None,
    **model: Any,
) -> Config:
    zero = {"stage": stage, "reduce_bucket_size": 50_000, **(options or {})}
    config = tiny_config(
        model={**MODEL, **model},
        training={**TRAINING, "dtype": dtype},
        parallel=parallel,
        deepspeed_section={"zero_optimization": zero},
    )
    return dataclasses.replace(config, recompute=recompute or RecomputeConfig())


MOE: dict[str, Any] = {**ARCHITECTURES["qwen3_moe"], "ffn_hidden_size": 64, "moe_router_topk": 4}
"""Every token is given to every expert: the even spread that estimates assume."""
UNALIGNED: dict[str, Any] = {**MOE, "ffn_hidden_size": 61, "full_rank_experts": True}
RELORA_MOE: dict[str, Any] = {**MOE, "variant": "relora"}
REPLICAS = {"expert_model_parallel_size": 2}
EP = {**TP, **REPLICAS}
ALL_TO_ALL = {"moe_token_dispatcher_type": "alltoall"}


def eight_bit(config: Config) -> Config:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="adamw8bit"))


def galore(config: Config, **options: Any) -> Config:
    section = dataclasses.replace(config.optimizer, name="galore", galore_rank=16, **options)
    return dataclasses.replace(config, optimizer=section)


def taught(config: Config, **weights: float) -> Config:
    return dataclasses.replace(config, distillation=DistillationConfig("of the test", **weights))


LAYOUTS: dict[str, tuple[Any, ...]] = {
    "zero 0, fp32": ("fp32", 0, None, None, None),
    "zero 2, bf16": ("bf16", 2, None, None, None),
    "tp": ("bf16", 1, TP, None, None),
    "tp without sp": ("bf16", 1, {**TP, "sequence_parallel": False}, None, None),
    "tp, replay": ("bf16", 1, TP, REPLAY, None),
    "tp, full": ("bf16", 1, TP, FULL, None),
    "pp": ("bf16", 1, PP, None, None),
    "pp, fp32": ("fp32", 1, PP, REPLAY, None),
    "vpp": ("bf16", 1, VPP, None, None),
    "zero 3, bf16": ("bf16", 3, None, None, TIGHT),
    "zero 3, bf16, replay": ("bf16", 3, None, REPLAY, TIGHT),
    "inverse": ("fp32", 0, None, INVERSE, None),
}
"""Of the architectures beside LLaMA."""


@cache
def rows() -> dict[str, Config]:
    return {
        "zero 0, fp32": row("fp32", 0),
        "zero 1, fp32": row("fp32", 1),
        "zero 1, bf16": row("bf16", 1),
        "zero 2, bf16": row("bf16", 2),
        "zero 2, bf16, bucket of the model": row("bf16", 2, None, None, BY_MODEL),
        "zero 1, fp32, bucket of the model": row("fp32", 1, PP, None, BY_MODEL),
        "zero 3, bf16, bucket of the model": row("bf16", 3, None, None, BY_MODEL),
        "zero 1, bf16, offload, bucket of the model": row("bf16", 1, None, None, {**OFFLOAD, **BY_MODEL}),
        "tp": row("bf16", 1, TP),
        "tp without sp": row("bf16", 1, {**TP, "sequence_parallel": False}),
        "tp, full rank": row("bf16", 1, TP, variant="full_rank"),
        "tp, replay": row("bf16", 1, TP, REPLAY),
        "tp, full": row("bf16", 1, TP, FULL),
        "tp, padded": row("bf16", 1, TP, REPLAY, **PADDED),
        "zero 3, padded": row("bf16", 3, None, None, TIGHT, **PADDED),
        "pp": row("bf16", 1, PP),
        "pp, replay": row("fp32", 1, PP, REPLAY),
        "vpp": row("bf16", 1, VPP),
        "inverse": row("fp32", 0, None, INVERSE),
        "pp, inverse": row("fp32", 1, PP, INVERSE),
        "zero 3, bf16, replay": row("bf16", 3, None, REPLAY, TIGHT),
        "zero 3, bf16": row("bf16", 3, None, None, TIGHT),
        "zero 3, bf16, all stay": row("bf16", 3),
        "zero 3, bf16, nothing stays": row("bf16", 3, None, REPLAY, NOTHING_STAYS),
        "zero 3, fp32": row("fp32", 3, None, None, WIDE),
        "zero 3, fp32, replay": row("fp32", 3, None, REPLAY, TIGHT),
        "zero 3, fp32, full": row("fp32", 3, None, FULL, WIDE),
        "zero 3, full rank, replay": row("bf16", 3, None, REPLAY, TIGHT, variant="full_rank"),
        "zero 3, cola, replay": row("bf16", 3, None, REPLAY, TIGHT, variant="cola"),
        "relora": row("bf16", 1, None, None, None, variant="relora"),
        "relora, fp32": row("fp32", 0, None, FULL, None, variant="relora"),
        "tp, relora, replay": row("bf16", 1, TP, REPLAY, None, variant="relora"),
        "pp, relora": row("bf16", 1, PP, None, None, variant="relora"),
        "zero 3, relora": row("bf16", 3, None, None, TIGHT, variant="relora"),
        "zero 2, relora, replay": row("bf16", 2, None, REPLAY, None, variant="relora"),
        "zero 3, relora, replay, nothing stays": row("bf16", 3, None, REPLAY, NOTHING_STAYS, variant="relora"),
        "zero 1, bf16, offload": row("bf16", 1, None, None, OFFLOAD),
        "zero 1, fp32, offload": row("fp32", 1, None, None, OFFLOAD),
        "zero 2, bf16, offload": row("bf16", 2, None, REPLAY, OFFLOAD),
        "zero 3, bf16, offload": row("bf16", 3, None, REPLAY, {**TIGHT, **OFFLOAD}),
        "zero 0, fp32, 8-bit": eight_bit(row("fp32", 0)),
        "zero 1, bf16, 8-bit": eight_bit(row("bf16", 1)),
        "zero 2, bf16, 8-bit": eight_bit(row("bf16", 2)),
        "zero 3, bf16, 8-bit": eight_bit(row("bf16", 3, None, REPLAY, TIGHT)),
        "tp, 8-bit": eight_bit(row("bf16", 1, TP)),
        "zero 1, bf16, galore": galore(row("bf16", 1, variant="full_rank")),
        "zero 3, bf16, galore": galore(row("bf16", 3, None, REPLAY, TIGHT, variant="full_rank")),
        "tp, galore": galore(row("bf16", 1, TP, variant="full_rank")),
        "zero 0, fp32, galore": galore(row("fp32", 0, variant="full_rank")),
        "zero 2, bf16, galore, projecting": galore(row("bf16", 2, variant="full_rank"), update_proj_gap=1),
        "tp, taught": taught(row("bf16", 1, TP)),
        "vpp, further full-rank layers": row("bf16", 1, VPP, num_layers=4, full_rank_layers=[0, 2]),
        "tp, taught, gpt2": taught(row("bf16", 1, TP, **GPT2)),
        "pp, taught": taught(row("bf16", 1, PP)),
        "vpp, taught": taught(row("bf16", 1, VPP)),
        "zero 3, taught, replay": taught(row("bf16", 3, None, REPLAY, TIGHT)),
        "taught in logits": taught(row("fp32", 0), kd_alpha=0.0, kd_beta=1.0),
        "tp without sp, taught": taught(row("bf16", 1, {**TP, "sequence_parallel": False}), kd_beta=1.0),
        "tp, taught in both": taught(row("fp32", 2, TP, FULL), kd_beta=1.0),
        **{
            f"{name}, {variant}": row("bf16", 1, None, None, None, **{**model, "variant": variant})
            for name, model in (("gpt2", GPT2), ("qwen3", QWEN3))
            for variant in VARIANTS
        },
        **{
            f"{kind}, {name}": row(dtype, zero, parallel, recompute, options, **model)
            for name, model in (("gpt2", GPT2), ("qwen3", QWEN3))
            for kind, (dtype, zero, parallel, recompute, options) in LAYOUTS.items()
        },
        "pp, gpt2, untied": row("bf16", 1, PP, None, None, **GPT2, tie_word_embeddings=False),
        "tp, gpt2, padded": row("bf16", 1, TP, REPLAY, None, **{**GPT2, **PADDED}),
        "moe": row("fp32", 0, None, None, None, **MOE),
        "moe, cola": row("bf16", 2, None, None, None, **MOE, variant="cola"),
        "moe, full rank": row("bf16", 1, TP, None, None, **MOE, variant="full_rank"),
        "tp, replay, moe": row("bf16", 1, TP, REPLAY, None, **MOE),
        "ep, moe": row("bf16", 1, EP, None, None, **MOE),
        "ep, full, moe": row("fp32", 1, EP, FULL, None, **MOE),
        "ep over replicas, moe": row("bf16", 1, REPLICAS, None, None, **MOE),
        "ep over replicas, replay, moe": row("fp32", 1, REPLICAS, REPLAY, None, **MOE),
        "ep over replicas, zero 0, moe": row("fp32", 0, REPLICAS, FULL, None, **MOE),
        "ep over replicas, moe, 8-bit": eight_bit(row("bf16", 1, REPLICAS, None, None, **MOE)),
        "ep over replicas, taught, moe": taught(row("bf16", 1, REPLICAS, REPLAY, None, **MOE)),
        "ep, taught, moe": taught(row("fp32", 1, EP, None, None, **MOE)),
        "all to all, moe": row("bf16", 1, {**REPLICAS, **ALL_TO_ALL}, REPLAY, None, **MOE),
        "ep, all to all, moe": row("fp32", 2, {**EP, **ALL_TO_ALL}, None, None, **MOE),
        "all to all, taught, moe": taught(row("bf16", 1, {**REPLICAS, **ALL_TO_ALL}, FULL, None, **MOE)),
        "pp, inverse, moe": row("fp32", 1, PP, INVERSE, None, **MOE),
        "zero 3, replay, moe": row("bf16", 3, None, REPLAY, TIGHT, **MOE),
        "moe of unaligned widths": row("bf16", 1, None, None, None, **{**MOE, "ffn_hidden_size": 61}),
        "moe, galore": galore(row("bf16", 1, None, None, None, **MOE, variant="full_rank")),
        "zero 3, galore, moe": galore(row("bf16", 3, None, REPLAY, TIGHT, **MOE, variant="full_rank")),
        "moe, full-rank experts": row("bf16", 1, None, None, None, **MOE, full_rank_experts=True),
        "tp, replay, moe, full-rank experts": row("fp32", 1, TP, REPLAY, None, **MOE, full_rank_experts=True),
        "ep over replicas, moe, full-rank experts": row("bf16", 1, REPLICAS, FULL, None, **MOE, full_rank_experts=True),
        "ep, relora, moe, full-rank experts": row("fp32", 1, EP, None, None, **RELORA_MOE, full_rank_experts=True),
        "relora, moe": row("fp32", 0, None, FULL, None, **RELORA_MOE),
        "tp, relora, replay, moe": row("bf16", 1, TP, REPLAY, None, **RELORA_MOE),
        "ep, relora, moe": row("fp32", 1, EP, None, None, **RELORA_MOE),
        "ep over replicas, relora, moe": row("bf16", 1, REPLICAS, None, None, **RELORA_MOE),
        "ep over replicas, relora, replay, moe": row("fp32", 0, REPLICAS, REPLAY, None, **RELORA_MOE),
        "pp, relora, moe": row("bf16", 1, PP, None, None, **RELORA_MOE),
        "zero 3, relora, replay, moe": row("bf16", 3, None, REPLAY, TIGHT, **RELORA_MOE),
        "zero 3, summed in the buffer": row("fp32", 3, None, None, {**TIGHT, "reduce_scatter": False}),
        "zero 3, no buffer": row("bf16", 3, None, REPLAY, {**TIGHT, "contiguous_gradients": False}),
        "zero 1, no buffer": row("fp32", 1, None, None, {"contiguous_gradients": False}),
        "zero 2, large vocabulary": row("bf16", 2, None, None, {"reduce_bucket_size": 300_000}, vocab_size=4096),
        "zero 2, large vocabulary, bucket of the model": row("bf16", 2, None, None, BY_MODEL, vocab_size=4096),
        "zero 2, fp32, large vocabulary, bucket of the model": row("fp32", 2, None, None, BY_MODEL, vocab_size=4096),
        "zero 1, large vocabulary, tied": row("bf16", 1, None, None, None, vocab_size=4096, tie_word_embeddings=True),
        "tp, zero 0": row("fp32", 0, TP),
        "tp, zero 3": row("bf16", 3, TP, None, TIGHT),
        "vpp, replay": row("bf16", 1, VPP, REPLAY, None, num_layers=8),
        "vpp, full": row("fp32", 1, VPP, FULL, None, num_layers=8),
        "cola without swiglu, replay": row("bf16", 1, None, REPLAY, None, variant="cola", only_lr_act=True),
        "moe of unaligned widths, full-rank experts": row("fp32", 1, None, None, None, **UNALIGNED),
        "moe of unaligned widths, full-rank experts, full": row("bf16", 1, None, FULL, None, **UNALIGNED),
        "pp, galore, full": galore(row("fp32", 1, PP, variant="full_rank"), proj_type="full"),
    }


Found = dict[str, tuple[StepProfile, StageEstimate]]


SOON = (
    "zero 0, fp32",
    "zero 1, bf16",
    "tp, replay",
    "tp, padded",
    "pp",
    "zero 3, bf16, replay",
    "zero 1, bf16, offload",
    "zero 1, bf16, 8-bit",
    "tp, relora, replay",
    "zero 3, bf16, galore",
    "tp, taught",
    "pp, gpt2",
    "tp, replay, qwen3",
    "all to all, moe",
    "ep over replicas, relora, moe",
    "zero 2, large vocabulary, bucket of the model",
    "zero 3, summed in the buffer",
    "vpp, replay",
    "moe of unaligned widths, full-rank experts",
)
"""The others are marked long: every row costs a second on an idle machine, and more where process groups are built."""
RARE = tuple(name for name in rows() if name not in SOON)
REFUSED = ("offload", "inverse")
"""Of which a simulation knows too little."""
SIMULATED = tuple(name for name in rows() if not any(word in name for word in REFUSED))


def count_rows(names: list[str]) -> Found:
    """On every rank: what was counted in a real step, and the estimate for this rank's stage."""
    found: Found = {}
    for name in names:
        config = rows()[name]
        context = initialize_parallel(config)
        counted = count_step(config, context)
        context.heartbeat.close()
        stages = estimate(config, context.world_size, UNFUSED).stages
        found[name] = counted, stages[context.rank // (context.world_size // len(stages))]
        fresh_world()
    return found


@pytest.fixture(scope="module")
def counted() -> list[Found]:
    return run_distributed(count_rows, 2, list(SOON))


@pytest.fixture(scope="module")
def counted_rarely() -> list[Found]:
    return run_distributed(count_rows, 2, list(RARE))


FEW_NUMBERS = 1024
"""Bytes in a group that the formula leaves out: loss, norm, overflow checks, sizes of outputs."""


def volumes(flows: list[CommVolume]) -> dict[tuple[str, str, int], int]:
    return {(flow.group, flow.kind, flow.size): flow.bytes for flow in flows}


def check_volumes(real: StepProfile, expected: StageEstimate) -> None:
    counted, estimated = volumes(real.flows), volumes(expected.flows)
    for key in counted | estimated:
        close = pytest.approx(counted.get(key, 0), rel=0.05, abs=FEW_NUMBERS)
        assert estimated.get(key, 0) == close, (key, counted, estimated)


def check_memory(real: Memory, expected: Memory, rel: float = 0.1) -> None:
    # device and host together: gloo ranks compute on the host
    assert expected.total + expected.host == pytest.approx(real.total, rel=rel), (real, expected)
    if not expected.host:
        for part in ("weights", "optimizer", "buffers"):
            assert getattr(expected, part) == pytest.approx(getattr(real, part), rel=0.01), (real, expected)


def cached_angles(config: Config) -> int:
    """Bytes of RoPE's angles in fp32, which Megatron-Core keeps per virtual stage, of a teacher as well."""
    if not position_table(config.model).architecture.is_rotary:
        return 0
    stages = config.parallel.virtual_pipeline_model_parallel_size or 1
    of_each = 4 * config.training.seq_length * head_width(config.model)
    return stages * (1 + (config.distillation.teacher is not None)) * of_each


def check_gradients(simulated: Memory, expected: Memory, remains: int) -> None:
    # what is counted as gradients is what nothing else is: the micro-batches' losses too, on real ranks under load
    # what gloo's threads have not let go of yet, and on CPUs the masters of frozen weights, which lie on the host
    found = expected.gradients + remains
    assert found == pytest.approx(simulated.gradients, rel=0.01, abs=4_000), (simulated, expected)


def check_row(real: StepProfile, expected: StageEstimate) -> None:
    check_volumes(real, expected)
    assert expected.operations.total == real.flops
    check_memory(real.memory, expected.memory)


@pytest.mark.parametrize("name", SOON)
def test_volumes_are_within_a_twentieth_of_those_that_were_intercepted(name: str, counted: list[Found]) -> None:
    for real, expected in (found[name] for found in counted):
        check_volumes(real, expected)


@pytest.mark.parametrize("name", SOON)
def test_operations_are_those_of_the_counter(name: str, counted: list[Found]) -> None:
    for real, expected in (found[name] for found in counted):
        assert expected.operations.total == real.flops


@pytest.mark.parametrize("name", SOON)
def test_the_peak_is_within_a_tenth_of_what_was_alive_and_the_state_within_a_hundredth(
    name: str, counted: list[Found]
) -> None:
    for real, expected in (found[name] for found in counted):
        check_memory(real.memory, expected.memory)


def has_owners(config: Config) -> bool:
    """Whether replicas differ: a matrix that GaLore projects is one rank's."""
    return config.optimizer.name == "galore" and config.parallel.pipeline_model_parallel_size == 1


@pytest.mark.long
@pytest.mark.parametrize("name", RARE)
def test_rarer_rows_hold_as_well(name: str, counted_rarely: list[Found]) -> None:
    found = [of_rank[name] for of_rank in counted_rarely]
    if has_owners(rows()[name]):  # the estimate is of the rank with the most
        found = [max(found, key=lambda pair: pair[0].memory.optimizer)]
    for real, expected in found:
        check_row(real, expected)


# a simulation takes ten seconds
@pytest.mark.parametrize(
    "name", [n if n in ("pp", "zero 1, bf16, 8-bit") else pytest.param(n, marks=pytest.mark.long) for n in SIMULATED]
)
def test_a_simulated_rank_does_exactly_what_the_real_one_does(name: str, request: pytest.FixtureRequest) -> None:
    counted: list[Found] = request.getfixturevalue("counted" if name in SOON else "counted_rarely")
    real, config = counted[1][name][0], rows()[name]
    # without stages both ranks do the same, and under load gloo's threads may keep a tensor too long on one of them
    same = config.parallel.pipeline_model_parallel_size == 1 and not has_owners(config)
    peers = counted if same else counted[1:]
    least = min(found[name][0].memory.total for found in peers)
    simulated = simulate(config, 2, 1)
    assert simulated.flows == real.flows  # bytes and calls
    assert simulated.flops == real.flops
    assert simulated.memory.total == pytest.approx(least, rel=0.01)
    expected = counted[1][name][1].memory
    frozen_masters = expected.host if METHODS[config.model.variant].has_frozen else 0
    check_gradients(simulated.memory, expected, frozen_masters + cached_angles(config))


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("stage", [2, 3])
def test_partial_gradients_are_summed_as_replicas_have_cut_them(stage: int, rank: int) -> None:
    config = row("bf16", stage, TP, REPLAY, TIGHT if stage == 3 else None)
    simulated, expected = simulate(config, 4, rank), estimate(config, 4, UNFUSED).stages[0]
    check_row(simulated, expected)


@pytest.mark.parametrize(
    ("world_size", "parallel", "dtype", "stage"),
    [
        (4, REPLICAS, "bf16", 1),
        pytest.param(4, REPLICAS, "fp32", 0, marks=pytest.mark.long),
        pytest.param(8, {**TP, "expert_model_parallel_size": 4}, "bf16", 1, marks=pytest.mark.long),
        pytest.param(8, {**PP, **REPLICAS}, "fp32", 1, marks=pytest.mark.long),
        pytest.param(4, {**REPLICAS, **ALL_TO_ALL}, "bf16", 1, marks=pytest.mark.long),
    ],
)
def test_experts_are_reduced_and_partitioned_over_the_replicas_that_hold_the_same(
    world_size: int, parallel: dict[str, Any], dtype: str, stage: int
) -> None:
    config = row(dtype, stage, parallel, REPLAY, None, **MOE)
    simulated, expected = simulate(config, world_size, 0), estimate(config, world_size, UNFUSED).stages[0]
    check_row(simulated, expected)
    assert {flow.size for flow in simulated.flows if flow.group == "EP's DP"} == {2}


ZERO_3 = ["--deepspeed.zero_optimization.stage", "3"]
SHORT = ["--training.global_batch_size", "64"]
LARGE = {
    "7B": ("llama2_7b", []),
    "13B": ("llama2_13b", []),
    "13B, 8-bit": ("llama2_13b", ["--optimizer.name", "adamw8bit"]),
    "7B, ZeRO-3": ("llama2_7b", ZERO_3),
    "7B, ZeRO-3, replay": ("llama2_7b", [*ZERO_3, "--recompute.strategy", "replay"]),
    # one micro-batch of each rank: the same peak, soon simulated
    "7B, short": ("llama2_7b", SHORT),
    "7B of 6 layers, short": ("llama2_7b", [*SHORT, "--model.num_layers", "6"]),
    "GPT-2 124M": ("gpt2_124m", []),
    "GPT-2 355M, short": ("gpt2_355m", ["--training.global_batch_size", "96"]),
    "Qwen3 0.6B, short": ("qwen3_0_6b", ["--training.global_batch_size", "32"]),
    "Qwen3 1.7B, short": ("qwen3_1_7b", ["--training.global_batch_size", "16"]),
    "Qwen3 8B, short": ("qwen3_8b", ["--training.global_batch_size", "8"]),
    "Qwen3 30B-A3B, short": ("qwen3_30b_a3b", ["--training.global_batch_size", "8"]),
    "7B, ZeRO-2, short": ("llama2_7b", [*SHORT, "--deepspeed.zero_optimization.stage", "2"]),
    "7B, ZeRO-2, replay, short": (
        "llama2_7b",
        [*SHORT, "--deepspeed.zero_optimization.stage", "2", "--recompute.strategy", "replay"],
    ),
}
SOONEST = "7B of 6 layers, short"


@pytest.mark.parametrize("name", [n if n == SOONEST else pytest.param(n, marks=pytest.mark.long) for n in LARGE])
def test_the_large_examples_are_estimated_as_they_are_simulated(name: str) -> None:
    example, overrides = LARGE[name]
    config = load_config(f"examples/{example}.yaml", overrides)
    simulated, expected = simulate(config, 8, 0), estimate(config, 8, UNFUSED).stages[0]
    check_volumes(simulated, expected)
    assert expected.operations.total == simulated.flops
    check_memory(simulated.memory, expected.memory, rel=0.05)
    check_gradients(simulated.memory, expected.memory, cached_angles(config))


def test_operations_are_counted_as_pytorch_counts_them() -> None:
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    with OperationCounter() as ours:
        (x @ w).sum().backward()
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    with FlopCounterMode(display=False) as theirs:
        (x @ w).sum().backward()
    attention = 2 * 8 * 8 * 4 * 2 * (2 + 5)
    assert ours.total == theirs.get_total_flops() + attention


def test_a_world_of_thousands_is_one_process() -> None:
    config = row("bf16", 1, {**TP, **PP})
    training = dataclasses.replace(config.training, global_batch_size=2048)
    config = dataclasses.replace(config, training=training)
    simulated, expected = simulate(config, 4096, 4095), estimate(config, 4096, UNFUSED).stages[1]
    assert not dist.is_initialized()
    check_volumes(simulated, expected)
    assert {flow.size for flow in simulated.flows if flow.group == "DP"} == {1024}
