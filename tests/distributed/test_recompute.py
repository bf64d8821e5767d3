"""Activation recomputation against none: losses, gradient norms and every gradient, bit for bit where promised."""

from __future__ import annotations

import dataclasses
import gc
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_crnet.communication import CommunicationCounter
from megatron_crnet.config import Config, RecomputeConfig
from megatron_crnet.engine import TrainEngine
from megatron_crnet.gpt import build_model_chunks
from megatron_crnet.live_memory import LiveMemory
from megatron_crnet.parallel import initialize_parallel
from tests.distributed.spawn import fresh_world, run_distributed
from tests.helpers import gradient_of, local_weights, micro_batches, random_tokens, tiny_config

REPLAY = RecomputeConfig(strategy="replay", segment_length=2)
REPLAY_AUTO = RecomputeConfig(strategy="replay", keep_attention_output=True)
FULL = RecomputeConfig(strategy="full", segment_length=2)
FULL_AUTO = RecomputeConfig(strategy="full")
INVERSE = RecomputeConfig(strategy="inverse")
VARIANTS = ("crnet", "full_rank", "low_rank", "cola")
TOLERANCE = {"fp32": 1e-4, "bf16": 1 / 16}
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

    def config(self, recompute: RecomputeConfig) -> Config:
        stored = {"activation_checkpointing": self.stored} if self.stored and recompute.strategy != "none" else {}
        plain = tiny_config(
            self.model,
            self.parallel,
            {"dtype": self.dtype},
            deepspeed_section={"zero_optimization": self.zero} if self.zero else {},
        )
        return dataclasses.replace(plain, recompute=recompute, deepspeed={**plain.deepspeed, **stored})


TP = {"tensor_model_parallel_size": 2}
PP = {"pipeline_model_parallel_size": 2}
VPP = {**PP, "virtual_pipeline_model_parallel_size": 2}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
WITHOUT_SP = {**TP, "sequence_parallel": False}
PARTITIONED = {"stage": 3, "stage3_param_persistence_threshold": 0}
OFFLOADED = {**PARTITIONED, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
ROWS = [
    Row("tp2", {"num_layers": 6}, TP, strategies=(*EXACT, INVERSE)),
    Row("tp2-without-sp-everything-stored", {}, WITHOUT_SP, stored=EVERYTHING_STORED, strategies=(REPLAY_AUTO, FULL)),
    Row("tp2-zero3-bf16", {}, TP, "bf16", PARTITIONED, strategies=(REPLAY, INVERSE)),
    Row("pp2-zero1", {"num_layers": 8}, PP, "fp32", {"stage": 1}, strategies=(REPLAY_AUTO, INVERSE)),
    Row("pp2-vpp2-zero1-bf16", {"num_layers": 8}, VPP, "bf16", {"stage": 1}, strategies=(REPLAY, FULL, INVERSE)),
    Row("dp2-zero2-bf16", {"full_rank_layers": [0, 2]}, {}, "bf16", {"stage": 2}, strategies=(REPLAY_AUTO, INVERSE)),
    Row("dp2-zero3-offload", {}, {}, "fp32", OFFLOADED, strategies=(REPLAY,)),
    Row("tp2-dropout", DROPOUT, TP, strategies=(REPLAY_AUTO, FULL)),
    Row("tp2-cola", {"variant": "cola"}, TP, strategies=(REPLAY_AUTO,)),
]
MORE_ON_TWO = [
    *(Row(f"tp2-{v}-replay", {"variant": v}, TP, strategies=(REPLAY_AUTO,)) for v in ("full_rank", "low_rank")),
    Row("tp2-partitioned", {}, WITHOUT_SP, stored={"partition_activations": True}, strategies=(REPLAY,)),
    Row("tp2-without-sp-dropout", DROPOUT, WITHOUT_SP, strategies=(REPLAY, FULL)),
    Row("tp2-dropout", DROPOUT, TP, strategies=(REPLAY, INVERSE)),
    Row("tp2-zero3-bf16", {}, TP, "bf16", PARTITIONED, strategies=(REPLAY_AUTO, FULL)),
    Row("pp2-zero1", {"num_layers": 8}, PP, "fp32", {"stage": 1}, strategies=(REPLAY, FULL)),
    # without a residual there is nothing to invert, and inverse is exact, too
    *(Row(f"tp2-{v}", {"variant": v}, TP, strategies=(FULL, INVERSE)) for v in VARIANTS if v != "crnet"),
]
LONG_ROWS = [
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
]


def train(config: Config, steps: int = 2) -> list[tuple[float, float, list[Tensor]]]:
    """Loss, gradient norm and this rank's gradients of each step; a collective call."""
    context = initialize_parallel(config)
    engine = TrainEngine(config, build_model_chunks(config), context)
    found = []
    for step in range(steps):
        tokens, _ = random_tokens(config, step)
        loss = engine.forward_backward(micro_batches(config, context.dp_rank, context.world_size, step), tokens.numel())
        gradients = [gradient_of(engine, weight).clone() for weight in local_weights(engine)]
        found.append((loss, engine.update()[0], gradients))
    engine.deepspeed.destroy()
    context.heartbeat.close()
    fresh_world()
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
            same = torch.tensor(close(steps, plain, TOLERANCE[row.dtype]) if inexact else same_bits(steps, plain))
            dist.all_reduce(same, op=dist.ReduceOp.MIN)
            found[row.name, str(recompute)] = bool(same)
    return found


@pytest.fixture(scope="module")
def bits() -> dict[tuple[str, str], bool]:
    return run_distributed(compare, 2, ROWS, timeout_s=500)[0]


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


# inverse: the error of all gradients together, by the first value of beta, with the guard and with a bound that
# never acts
BETAS = (1.0, 0.3, 0.0)
UNGUARDED = 1e30


@dataclass(frozen=True)
class Case:
    """A model whose outputs are hard to invert.

    Attributes:
        growth: B of v and up is this many times that of the layer below, so that Y shrinks downward.
        outlier: how strongly the first token's `up` of the full-rank layer answers, in every sequence.
        steps: steps of training before the gradients are compared.
    """

    name: str
    beta: float
    growth: float = 1.0
    outlier: float = 0.0
    steps: int = 0

    def config(self, dtype: str) -> Config:
        plain = tiny_config(
            {"num_layers": 9, "beta_init": self.beta, "init_method_std": 0.05},
            training={"dtype": dtype},
            optimizer={"lr": 0.01, "lr_warmup_steps": 0},
        )
        return dataclasses.replace(plain, recompute=INVERSE)


CASES = [Case(f"beta-{beta}", beta) for beta in BETAS]
CASES += [
    Case("growing", 1.0, growth=4.0),
    Case("growing-outlier", 1.0, growth=4.0, outlier=300.0),
    Case("trained", 1.0, steps=20),
    Case("trained-small-beta", 0.3, steps=20),
]


@dataclass(frozen=True)
class Found:
    """Error of all gradients together with the guard and without it, and how many anchors it has added."""

    guarded: float
    unguarded: float
    added: int


def inverse_errors() -> dict[tuple[str, str], Found]:
    return {(dtype, case.name): _inverse_error(case, case.config(dtype)) for dtype in TOLERANCE for case in CASES}


def _inverse_error(case: Case, config: Config) -> Found:
    context = initialize_parallel(config)
    chunks = build_model_chunks(config)
    for layer in chunks[0].decoder.layers:
        for piece in (*layer.linear_qkv.pieces(), *layer.linear_gate_up.pieces()):
            if piece.position in ("v", "up") and piece.suffix == "b.weight":
                piece.parameter.data[piece.index].mul_(case.growth**layer.index)
    if case.outlier:
        _answer_strongly_to_the_first_token(chunks[0], case.outlier)
    engine = TrainEngine(config, chunks, context)
    for step in range(case.steps):
        _step(engine, step)
        engine.update()
    guarded, added, block = _gradient(engine, case.steps), engine.added_anchors, chunks[0].decoder
    block.config.recompute_inverse_tolerance = UNGUARDED
    engine.restore_schedule(case.steps)  # anchors anew
    unguarded = _gradient(engine, case.steps)
    assert len(block.segments) < 4
    block.segments = []
    plain = _gradient(engine, case.steps)
    _close(engine)
    errors = [float((gradient - plain).norm() / plain.norm()) for gradient in (guarded, unguarded)]
    return Found(*errors, added)


@torch.no_grad()
def _answer_strongly_to_the_first_token(model: Any, strength: float) -> None:
    """Token 0, which starts every sequence, gets large outputs in layer 0; all others keep theirs."""
    embedding, layer = model.embedding.word_embeddings.weight, model.decoder.layers[0]
    direction = embedding[0].float() / embedding[0].float().norm()
    embedding[1:] -= ((embedding[1:].float() @ direction)[:, None] * direction).to(embedding.dtype)
    for piece in layer.linear_o.pieces():  # so that the residual stream keeps the embedding's directions
        piece.parameter[piece.index].zero_()
    for piece in layer.linear_gate_up.pieces():
        if piece.position == "up":
            up = piece.parameter[piece.index]
            answer = torch.randn(up.shape[0], generator=torch.Generator().manual_seed(1))
            up += (strength * torch.outer(answer, direction)).to(up.dtype)


def _engine(config: Config) -> TrainEngine:
    context = initialize_parallel(config)
    return TrainEngine(config, build_model_chunks(config), context)


def _step(engine: TrainEngine, step: int = 0) -> float:
    tokens, _ = random_tokens(engine.config, step)
    context = engine.context
    batches = micro_batches(engine.config, context.dp_rank, context.world_size, step)
    for batch in batches:
        batch["tokens"][:, 0] = 0
    return engine.forward_backward(batches, tokens.numel())


def _gradient(engine: TrainEngine, step: int) -> Tensor:
    """This rank's gradient of one step, on gradients that start at zero."""
    engine.deepspeed.module.zero_grad()
    _step(engine, step)
    return torch.cat([gradient_of(engine, weight).double().flatten() for weight in local_weights(engine)])


def _close(engine: TrainEngine) -> None:
    engine.context.heartbeat.close()
    engine.deepspeed.destroy()
    fresh_world()


@pytest.fixture(scope="module")
def inverse() -> dict[tuple[str, str], Found]:
    return run_distributed(inverse_errors, 1)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_inverse_stays_within_its_tolerance(inverse: dict[Any, Found], dtype: str, case: Case) -> None:
    found = inverse[dtype, case.name]
    print(dtype, case.name, found)  # for docs/results.md
    assert found.guarded < TOLERANCE[dtype]
    assert (found.added > 0) == (dtype == "bf16" or case.name not in ("beta-1.0", "trained"))


def test_without_the_guard_small_betas_and_outputs_that_shrink_downward_would_ruin_the_gradient(
    inverse: dict[Any, Found],
) -> None:
    # at 0 the scale is the epsilon 1e-6, and seven divisions by it leave the range of fp32
    assert all(not inverse[dtype, "beta-0.0"].unguarded < 1 for dtype in TOLERANCE)
    assert inverse["bf16", "beta-0.3"].unguarded > 1
    assert all(inverse[dtype, "growing"].unguarded > TOLERANCE[dtype] for dtype in TOLERANCE)


def stale_plan() -> tuple[bool, bool, int]:
    """The betas change behind the engine's back, then an update notices."""
    config = dataclasses.replace(
        tiny_config({"num_layers": 9, "beta_init": 1.0}), recompute=RecomputeConfig(strategy="inverse")
    )
    engine = _engine(config)
    _step(engine)
    finite = all(bool(gradient_of(engine, w).isfinite().all()) for w in local_weights(engine))
    engine.deepspeed.module.zero_grad()
    for weight in local_weights(engine):
        if weight.name.endswith("beta"):
            weight.parameter.data.fill_(1e-5 if ".5." in weight.name else 1.0)
    _step(engine)
    poisoned = any(bool(gradient_of(engine, w).isnan().any()) for w in local_weights(engine))
    engine.update()
    return finite, poisoned, engine.added_anchors


def test_a_plan_for_other_betas_gives_no_number_rather_than_a_wrong_one() -> None:
    finite, poisoned, added = run_distributed(stale_plan, 1)[0]
    assert finite
    assert poisoned
    assert added > 0


def traffic() -> list[list[int]]:
    """Bytes of all tensor-parallel calls of a step, without and with recomputation, for several models."""
    found = []
    for model in ({}, {"variant": "cola"}, {"beta_init": 0.01}):
        volumes = []
        for recompute in (RecomputeConfig(), REPLAY, INVERSE):
            config = dataclasses.replace(tiny_config({"num_layers": 6, **model}, TP), recompute=recompute)
            engine = _engine(config)
            _step(engine)  # inverse looks at the sizes of outputs first
            with CommunicationCounter() as counter:
                _step(engine)
            volumes.append(counter.total("all_gather", "reduce_scatter", "all_reduce").bytes)
            engine.context.heartbeat.close()
            fresh_world()
        found.append(volumes)
    return found


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
        engine = _engine(dataclasses.replace(tiny_config({"num_layers": 6}), recompute=recompute))
        _step(engine)
        with LiveMemory() as memory:
            alive = []
            for _ in range(4):
                _step(engine)
                alive.append(_settled(memory))
            for _ in range(3):
                _abandon(engine)
                alive.append(_settled(memory))
            for _ in range(3):
                _fail(engine)
                # autograd holds on to a failed pass until the next one, without recomputation as well
                _step(engine)
                gc.collect()
                alive.append(_settled(memory))
        found[str(recompute)] = alive
        engine.context.heartbeat.close()
        fresh_world()
    return found


def _settled(memory: LiveMemory) -> int:
    """Bytes alive once they no longer change: gloo's thread lets go of a reduced tensor a moment after the call."""
    found = None
    while found != memory.current:
        found = memory.current
        time.sleep(0.05)
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
