"""Activation recomputation against none: losses, gradient norms and every gradient, bit for bit where promised."""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_crnet.config.schema import Config, RecomputeConfig
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.planning.counters import CommunicationCounter, LiveMemory
from tests.distributed.engines import INVERSE, INVERSE_TOLERANCE, build_engine, close_engine, run_step, settled
from tests.distributed.spawn import run_distributed
from tests.helpers import (
    ARCHITECTURES,
    FULL_RANK_EXPERTS,
    PADDED,
    PADDED_GPT2,
    PADDED_MOE,
    PADDED_QWEN3,
    gradient_of,
    local_weights,
    micro_batches,
    random_tokens,
    tiny_config,
)

REPLAY = RecomputeConfig(strategy="replay", segment_length=2)
REPLAY_AUTO = RecomputeConfig(strategy="replay", keep_attention_output=True)
FULL = RecomputeConfig(strategy="full", segment_length=2)
FULL_AUTO = RecomputeConfig(strategy="full")
VARIANTS = ("crnet", "full_rank", "low_rank", "cola")
GPT2, QWEN3, MOE = ARCHITECTURES["gpt2"], ARCHITECTURES["qwen3"], ARCHITECTURES["qwen3_moe"]
EXACT = (REPLAY, REPLAY_AUTO, FULL)
EVERYTHING_STORED = {
    "partition_activations": True,
    "cpu_checkpointing": True,
    "contiguous_memory_optimization": True,
    "number_checkpoints": 3,
    "synchronize_checkpoint_boundary": True,
    "profile": True,
}


@dataclass(frozen=True)
class Row:
    """A layout and a model, and the exact strategies that are compared with none on it."""

    name: str
    model: dict[str, Any] = field(default_factory=dict, hash=False)
    parallel: dict[str, Any] = field(default_factory=dict, hash=False)
    dtype: str = "fp32"
    zero: dict[str, Any] = field(default_factory=dict, hash=False)
    stored: dict[str, Any] = field(default_factory=dict, hash=False)
    strategies: tuple[RecomputeConfig, ...] = EXACT
    data: dict[str, Any] = field(default_factory=dict, hash=False)
    sequences: int = 8

    def config(self, recompute: RecomputeConfig) -> Config:
        stored = {"activation_checkpointing": self.stored} if self.stored and recompute.strategy != "none" else {}
        plain = tiny_config(
            self.model,
            self.parallel,
            {"dtype": self.dtype, "global_batch_size": self.sequences},
            deepspeed_section={"zero_optimization": self.zero} if self.zero else {},
            data=self.data,
        )
        return dataclasses.replace(plain, recompute=recompute, deepspeed={**plain.deepspeed, **stored})


TP = {"tensor_model_parallel_size": 2}
EP = {**TP, "expert_model_parallel_size": 2}
REPLICAS = {"expert_model_parallel_size": 2}
ALL_TO_ALL = {**REPLICAS, "moe_token_dispatcher_type": "alltoall"}
PP = {"pipeline_model_parallel_size": 2}
VPP = {**PP, "virtual_pipeline_model_parallel_size": 2}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
WITHOUT_SP = {**TP, "sequence_parallel": False}
PARTITIONED = {"stage": 3, "stage3_param_persistence_threshold": 0}
OFFLOADED = {**PARTITIONED, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True}
ROWS = [
    Row("tp2", {"num_layers": 6}, TP, strategies=(*EXACT, INVERSE)),
    Row("tp2-without-sp-everything-stored", {}, WITHOUT_SP, stored=EVERYTHING_STORED, strategies=(REPLAY_AUTO, FULL)),
    Row("tp2-zero3-bf16", {}, TP, "bf16", PARTITIONED, strategies=(REPLAY,)),
    Row("pp2-vpp2-zero1-bf16", {"num_layers": 8}, VPP, "bf16", {"stage": 1}, strategies=(INVERSE,)),
    Row("dp2-zero2-bf16", {"full_rank_layers": [0, 2]}, {}, "bf16", {"stage": 2}, strategies=(REPLAY_AUTO,)),
    Row("tp2-dropout", DROPOUT, TP, strategies=(REPLAY_AUTO, FULL)),
    Row("tp2-gpt2", GPT2, TP, strategies=(REPLAY_AUTO,), data=DOCUMENTS),
    Row("tp2-ep2-qwen3-moe", MOE, EP, strategies=(REPLAY_AUTO, INVERSE)),
    Row("dp2-ep2-all-to-all", MOE, ALL_TO_ALL, "bf16", {"stage": 1}, strategies=(REPLAY,)),
    Row("dp2-ep2-full-rank-experts", FULL_RANK_EXPERTS, REPLICAS, "bf16", {"stage": 1}, strategies=(REPLAY, FULL)),
]
# two micro-batches instead of four, where two ranks are one replica without a pipeline
ROWS = [
    dataclasses.replace(row, sequences=4) if row.parallel.keys() & TP and not row.parallel.keys() & PP else row
    for row in ROWS
]
MORE_ON_TWO = [
    Row("pp2-zero1", {"num_layers": 8}, PP, "fp32", {"stage": 1}, strategies=(REPLAY_AUTO, INVERSE)),
    Row("dp2-zero3-offload", {}, {}, "fp32", OFFLOADED, strategies=(REPLAY,)),
    Row("tp2-cola", {"variant": "cola", "only_lr_act": True}, TP, strategies=(REPLAY_AUTO,)),
    Row("tp2-relora", {"variant": "relora"}, TP, strategies=(REPLAY_AUTO,)),
    Row("tp2-documents-dropout", DROPOUT, TP, strategies=(REPLAY_AUTO,), data=DOCUMENTS),
    Row("pp2-vpp2-documents", {"num_layers": 8}, VPP, "bf16", {"stage": 1}, strategies=(REPLAY,), data=DOCUMENTS),
    Row("pp2-vpp2-gpt2", {**GPT2, "num_layers": 8}, VPP, "bf16", {"stage": 1}, strategies=(REPLAY,)),
    Row("tp2-gpt2", {**GPT2, "num_layers": 6}, TP, strategies=(REPLAY_AUTO, FULL, INVERSE), data=DOCUMENTS),
    Row("tp2-zero3-gpt2-dropout", {**GPT2, **DROPOUT}, TP, "bf16", PARTITIONED, strategies=(REPLAY,)),
    Row("tp2-ep2-qwen3-moe", {**MOE, "num_layers": 6}, EP, strategies=(*EXACT, INVERSE)),
    Row("dp2-ep2-moe", {**MOE, **DROPOUT}, REPLICAS, strategies=(*EXACT, INVERSE)),
    Row("dp2-ep2-all-to-all", {**MOE, **DROPOUT}, ALL_TO_ALL, strategies=(*EXACT, INVERSE)),
    Row("tp2-ep2-all-to-all", MOE, {**TP, **ALL_TO_ALL}, "bf16", {"stage": 2}, strategies=(*EXACT, INVERSE)),
    Row("dp2-ep2-qwen3-moe", MOE, REPLICAS, "bf16", {"stage": 1}, strategies=(REPLAY, FULL)),
    Row("tp2-full-rank-experts", {**FULL_RANK_EXPERTS, "num_layers": 6}, TP, strategies=(*EXACT, INVERSE)),
    Row("tp2-ep2-full-rank-experts-relora", {**FULL_RANK_EXPERTS, "variant": "relora"}, EP, strategies=EXACT),
    Row("tp2-qwen3-moe-dropout", {**MOE, **DROPOUT}, TP, "bf16", {"stage": 2}, strategies=(REPLAY, FULL)),
    Row("pp2-vpp2-qwen3-moe", {**MOE, "num_layers": 8}, VPP, "bf16", {"stage": 1}, strategies=(REPLAY_AUTO, INVERSE)),
    Row("tp2-qwen3", {**QWEN3, "num_layers": 6}, WITHOUT_SP, strategies=(REPLAY, FULL, INVERSE)),
    *(Row(f"tp2-ep2-{v}-moe", {**MOE, "variant": v}, EP, strategies=EXACT) for v in VARIANTS if v != "crnet"),
    Row("dp2-ep2-relora-moe", {**MOE, **DROPOUT, "variant": "relora"}, REPLICAS, strategies=EXACT),
    Row("tp2-ep2-relora-moe", {**MOE, "variant": "relora"}, EP, "bf16", {"stage": 1}, strategies=EXACT),
    Row("dp2-zero3-moe", {**MOE, **DROPOUT}, {}, "bf16", PARTITIONED, strategies=(*EXACT, INVERSE)),
    Row("dp2-moe-stored", MOE, {}, stored={"cpu_checkpointing": True}, strategies=(REPLAY, FULL)),
    *(
        Row(f"tp2-{name}-{v}", {**model, "variant": v}, TP, strategies=EXACT)
        for name, model in (("gpt2", GPT2), ("qwen3", QWEN3))
        for v in VARIANTS
    ),
    Row("pp2-qwen3", {**QWEN3, "num_layers": 8}, PP, "fp32", {"stage": 1}, strategies=(*EXACT, INVERSE)),
    Row("dp2-zero3-qwen3", QWEN3, {}, "bf16", PARTITIONED, strategies=(*EXACT, INVERSE)),
    Row("tp2-qwen3-padded", PADDED_QWEN3, TP, strategies=(*EXACT, INVERSE)),
    Row("tp2-zero2-qwen3", QWEN3, TP, "bf16", {"stage": 2}, strategies=(*EXACT, INVERSE)),
    Row("pp2-vpp2-qwen3", {**QWEN3, "num_layers": 8}, VPP, "bf16", {"stage": 1}, strategies=EXACT),
    Row("pp2-gpt2-padded", {**PADDED_GPT2, "num_layers": 8}, PP, strategies=(*EXACT, INVERSE)),
    Row("tp2-ep2-zero2-moe", PADDED_MOE, EP, "bf16", {"stage": 2}, strategies=(*EXACT, INVERSE)),
    Row("tp2-gpt2-dropout", {**GPT2, **DROPOUT}, TP, strategies=EXACT, data=DOCUMENTS),
    Row("pp2-vpp2-zero1-bf16", {"num_layers": 8}, VPP, "bf16", {"stage": 1}, strategies=(REPLAY, FULL)),
    Row("dp2-zero2-bf16", {"full_rank_layers": [0, 2]}, {}, "bf16", {"stage": 2}, strategies=(INVERSE,)),
    Row("tp2-padded", {**PADDED, "num_layers": 6}, TP, strategies=(*EXACT, INVERSE)),
    Row("tp2-relora", {"variant": "relora"}, TP, strategies=(FULL,)),
    Row("tp2-documents", {"num_query_groups": 2}, TP, strategies=(*EXACT, INVERSE), data=DOCUMENTS),
    Row("tp2-documents-dropout", DROPOUT, TP, strategies=(REPLAY, FULL), data=DOCUMENTS),
    Row(
        "pp2-vpp2-documents",
        {"num_layers": 8},
        VPP,
        "bf16",
        {"stage": 1},
        strategies=(REPLAY_AUTO, FULL),
        data=DOCUMENTS,
    ),
    *(
        Row(f"tp2-{v}-documents", {"variant": v}, TP, strategies=(*EXACT, INVERSE), data=DOCUMENTS)
        for v in VARIANTS
        if v != "crnet"
    ),
    Row("tp2-without-sp-documents-dropout", DROPOUT, WITHOUT_SP, strategies=(*EXACT, INVERSE), data=DOCUMENTS),
    Row("dp2-zero3-documents", {}, {}, "bf16", PARTITIONED, strategies=(*EXACT, INVERSE), data=DOCUMENTS),
    Row("tp2-documents-stored", {}, WITHOUT_SP, stored=EVERYTHING_STORED, strategies=(REPLAY, FULL), data=DOCUMENTS),
    *(Row(f"tp2-{v}-replay", {"variant": v}, TP, strategies=(REPLAY_AUTO,)) for v in VARIANTS if v != "crnet"),
    *(Row(f"tp2-{v}-padded", {**PADDED, "variant": v}, TP, strategies=EXACT) for v in VARIANTS if v != "crnet"),
    Row("tp2-zero3-bf16-padded", PADDED, TP, "bf16", PARTITIONED, strategies=(REPLAY, INVERSE)),
    Row("pp2-vpp2-padded", {**PADDED, "num_layers": 8}, VPP, "bf16", {"stage": 1}, strategies=(REPLAY, FULL, INVERSE)),
    Row("tp2-partitioned", {}, WITHOUT_SP, stored={"partition_activations": True}, strategies=(REPLAY,)),
    Row("tp2-without-sp-dropout", DROPOUT, WITHOUT_SP, strategies=(REPLAY, FULL)),
    Row("tp2-dropout", DROPOUT, TP, strategies=(REPLAY, INVERSE)),
    Row("tp2-zero3-bf16", {}, TP, "bf16", PARTITIONED, strategies=(REPLAY_AUTO, FULL, INVERSE)),
    Row("pp2-zero1", {"num_layers": 8}, PP, "fp32", {"stage": 1}, strategies=(REPLAY, FULL)),
    # without a residual there is nothing to invert, and inverse is exact, too
    *(Row(f"tp2-{v}", {"variant": v}, TP, strategies=(FULL, INVERSE)) for v in VARIANTS if v != "crnet"),
]
LONG_ROWS = [
    *(
        Row(
            f"{layout}-{name}-zero{stage}-{dtype}",
            {"num_layers": 8, **model},
            parallel,
            dtype,
            {"stage": stage},
            strategies=(REPLAY_AUTO, FULL_AUTO),
        )
        for layout, parallel, stages in (
            ("dp4", {}, (2, 3)),
            ("tp2", TP, (0, 1, 2, 3)),
            ("tp2-without-sp", {**TP, "sequence_parallel": False}, (0, 3)),
            ("tp2-pp2", {**TP, **PP}, (0, 1)),
            ("tp2-vpp2", {**TP, **VPP}, (1,)),
            ("vpp2", VPP, (1,)),
        )
        for stage in stages
        for dtype in ("fp32", "bf16")
        if dtype == "fp32" or stage > 0
        for name, model in (("crnet-dropout", DROPOUT), ("cola", {"variant": "cola"}))
    ),
    *(
        Row(f"{layout}-{name}", {**model, "num_layers": 8}, parallel, "bf16", {"stage": stage}, strategies=EXACT)
        for layout, parallel, stage in (("tp2-pp2", {**TP, **PP}, 1), ("tp2-zero3", TP, 3))
        for name, model in (("gpt2", GPT2), ("qwen3", QWEN3), ("moe", MOE))
    ),
    Row("pp2-ep2-moe", {**MOE, "num_layers": 8}, {**REPLICAS, **PP}, "bf16", {"stage": 1}, strategies=EXACT),
]


def train(config: Config, steps: int = 2) -> list[tuple[float, float, list[Tensor]]]:
    """Loss, gradient norm and this rank's gradients of each step; a collective call."""
    engine = build_engine(config)
    context, found = engine.context, []
    for step in range(steps):
        tokens, _ = random_tokens(config, step)
        loss = engine.forward_backward(micro_batches(config, context.dp_rank, context.world_size, step), tokens.numel())
        trained = [weight for weight in local_weights(engine) if weight.parameter.requires_grad]
        gradients = [gradient_of(engine, weight).clone() for weight in trained]
        found.append((loss, engine.update()[0], gradients))
    close_engine(engine)
    return found


def same_bits(one: Any, other: Any) -> bool:
    return all(
        a[:2] == b[:2] and all(torch.equal(x, y) for x, y in zip(a[2], b[2], strict=True))
        for a, b in zip(one, other, strict=True)
    )


def close(one: Any, other: Any, tolerance: float) -> bool:
    """Whether this rank's gradient as a whole differs by less than `tolerance` in every step."""
    gradients = [[torch.cat([x.double().flatten() for x in step[2]]) for step in steps] for steps in (one, other)]
    return all(float((a - b).norm() / b.norm()) < tolerance for a, b in zip(*gradients, strict=True))


def compare(rows: list[Row]) -> dict[tuple[str, str], bool]:
    found = {}
    for row in rows:
        plain = train(row.config(RecomputeConfig()))
        assert all(torch.isfinite(gradient).all() for _, _, gradients in plain for gradient in gradients)
        for recompute in row.strategies:
            steps = train(row.config(recompute))
            inexact = recompute == INVERSE and row.model.get("variant", "crnet") == "crnet"
            same = torch.tensor(
                close(steps, plain, INVERSE_TOLERANCE[row.dtype]) if inexact else same_bits(steps, plain)
            )
            dist.all_reduce(same, op=dist.ReduceOp.MIN)
            found[row.name, str(recompute)] = bool(same)
    return found


@pytest.fixture(scope="module")
def bits() -> dict[tuple[str, str], bool]:
    return run_distributed(compare, 2, ROWS)[0]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_losses_norms_and_gradients_have_the_same_bits_or_those_of_inverse_are_close(
    row: Row, bits: dict[tuple[str, str], bool]
) -> None:
    assert {str(recompute): bits[row.name, str(recompute)] for recompute in row.strategies} == {
        str(recompute): True for recompute in row.strategies
    }


@pytest.mark.long
def test_more_rows_on_two_ranks() -> None:
    found = run_distributed(compare, 2, MORE_ON_TWO, timeout_s=900)[0]
    assert [key for key, same in found.items() if not same] == []


@pytest.mark.long
@pytest.mark.parametrize("start", range(0, len(LONG_ROWS), 14))
def test_the_whole_matrix_has_the_same_bits(start: int) -> None:
    found = run_distributed(compare, 4, LONG_ROWS[start : start + 14], timeout_s=1500)[0]
    assert [key for key, same in found.items() if not same] == []


def traffic() -> list[list[int]]:
    """Bytes of all tensor-parallel calls of a step, without and with recomputation, for several models."""
    found = []
    for model in ({"variant": "cola"}, {"beta_init": 0.01}):
        volumes = []
        for recompute in (RecomputeConfig(), REPLAY, INVERSE):
            config = dataclasses.replace(tiny_config({"num_layers": 6, **model}, TP), recompute=recompute)
            engine = build_engine(config)
            run_step(engine)  # inverse looks at the sizes of outputs first
            with CommunicationCounter() as counter:
                run_step(engine)
            volumes.append(counter.total("all_gather", "reduce_scatter", "all_reduce").bytes)
            close_engine(engine)
        found.append(volumes)
    return found


@pytest.mark.long
def test_rebuilding_adds_no_communication() -> None:
    for none, replay, inverse in run_distributed(traffic, 2)[0]:
        assert none > 0
        assert (replay, inverse) == (none, none)


class RefusedError(Exception):
    pass


def memory_over_steps() -> dict[str, list[int]]:
    """Bytes alive after each step, each abandoned micro-batch and each failed backward pass."""
    found: dict[str, list[int]] = {}
    for recompute in (REPLAY, REPLAY_AUTO, FULL, INVERSE):
        engine = build_engine(dataclasses.replace(tiny_config({"num_layers": 6}), recompute=recompute))
        run_step(engine)
        with LiveMemory() as memory:
            alive = []
            for _ in range(3):
                run_step(engine)
                alive.append(settled(memory))
            for _ in range(2):
                _abandon(engine)
                alive.append(settled(memory))
            for _ in range(2):
                _fail(engine)
                # autograd holds on to a failed pass until the next one, without recomputation as well
                run_step(engine)
                gc.collect()
                alive.append(settled(memory))
        found[str(recompute)] = alive
        close_engine(engine)
    return found


def _abandon(engine: TrainEngine) -> None:
    batch = micro_batches(engine.config, 0, 1)[0]
    engine.chunks[0].token_losses(batch)


def _fail(engine: TrainEngine) -> None:
    def refuse(_: Any) -> None:
        raise RefusedError

    parameter = engine.chunks[0].decoder.layers[1].input_layernorm.weight
    handle = parameter.register_hook(refuse)
    batch = micro_batches(engine.config, 0, 1)[0]
    with pytest.raises(RefusedError):
        engine.chunks[0].token_losses(batch).sum().backward()
    handle.remove()


def test_no_memory_grows_over_steps_abandoned_passes_and_errors() -> None:
    for strategy, alive in run_distributed(memory_over_steps, 1)[0].items():
        assert len(set(alive)) == 1, (strategy, alive)


def alive_after_a_step() -> list[list[int]]:
    """Bytes of a step that are alive after it, by model: without recomputation, and with it."""
    found = []
    for model, parallel in (({}, {}), (MOE, {}), (MOE, {"moe_token_dispatcher_type": "alltoall"})):
        of_model = []
        for recompute in (RecomputeConfig(), REPLAY, FULL):
            engine = build_engine(dataclasses.replace(tiny_config(model, parallel), recompute=recompute))
            run_step(engine)
            with LiveMemory() as memory:
                run_step(engine)
                of_model.append(settled(memory))
            close_engine(engine)
        found.append(of_model)
    return found


def test_nothing_that_a_rebuilt_layer_used_is_alive_after_the_step() -> None:
    for none, *rebuilt in run_distributed(alive_after_a_step, 1)[0]:
        assert rebuilt == [none, none]
