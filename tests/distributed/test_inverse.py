"""`inverse` rebuilds outputs by division: how wrong gradients are with its guard, and without it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_crnet.config.schema import Config
from megatron_crnet.distributed.process_groups import initialize_parallel
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.model.gpt import build_model_chunks
from tests.distributed.engines import INVERSE, INVERSE_TOLERANCE, build_engine, close_engine, run_step
from tests.distributed.spawn import run_distributed
from tests.helpers import gradient_of, local_weights, tiny_config

BETAS = (1.0, 0.3, 0.0)
UNGUARDED = 1e30
"""A bound that never acts."""


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
CASES += [Case("growing", 1.0, growth=5.0), Case("growing-outlier", 1.0, growth=5.0, outlier=300.0)]
TRAINED = [Case("trained", 1.0, steps=8), Case("trained-small-beta", 0.3, steps=8)]


@dataclass(frozen=True)
class Found:
    """Error of all gradients together with the guard and without it, and how many checkpointed layers it has added."""

    guarded: float
    unguarded: float
    added: int


def inverse_errors(cases: list[Case]) -> dict[tuple[str, str], Found]:
    return {
        (dtype, case.name): _inverse_error(case, case.config(dtype)) for dtype in INVERSE_TOLERANCE for case in cases
    }


def _inverse_error(case: Case, config: Config) -> Found:
    context = initialize_parallel(config)
    chunks = build_model_chunks(config)
    for layer in chunks[0].decoder.layers:
        for piece in (*layer.linear["qkv"].shards(), *layer.linear["gate_up"].shards()):
            if piece.position in ("v", "up") and piece.suffix == "b.weight":
                piece.parameter.data[piece.index].mul_(case.growth**layer.index)
    if case.outlier:
        _answer_strongly_to_the_first_token(chunks[0], case.outlier)
    engine = TrainEngine(config, chunks, context)
    for step in range(case.steps):
        run_step(engine, step)
        engine.update()
    guarded, added, block = _gradient(engine, case.steps), engine.guard.added if engine.guard else -1, chunks[0].decoder
    block.config.recompute_inverse_tolerance = UNGUARDED
    engine.restore_schedule(case.steps)  # segments anew
    unguarded = _gradient(engine, case.steps)
    assert len(block.segments) < 4
    block.segments = []
    plain = _gradient(engine, case.steps)
    close_engine(engine)
    errors = [float((gradient - plain).norm() / plain.norm()) for gradient in (guarded, unguarded)]
    return Found(*errors, added)


@torch.no_grad()
def _answer_strongly_to_the_first_token(model: Any, strength: float) -> None:
    """Token 0, which starts every sequence, gets large outputs in layer 0; all others keep theirs."""
    embedding, layer = model.embedding.word_embeddings.weight, model.decoder.layers[0]
    direction = embedding[0].float() / embedding[0].float().norm()
    embedding[1:] -= ((embedding[1:].float() @ direction)[:, None] * direction).to(embedding.dtype)
    for piece in layer.linear["o"].shards():  # so that the residual stream keeps the embedding's directions
        piece.parameter[piece.index].zero_()
    for piece in layer.linear["gate_up"].shards():
        if piece.position == "up":
            up = piece.parameter[piece.index]
            answer = torch.randn(up.shape[0], generator=torch.Generator().manual_seed(1))
            up += (strength * torch.outer(answer, direction)).to(up.dtype)


def _gradient(engine: TrainEngine, step: int) -> Tensor:
    """This rank's gradient of one step, on gradients that start at zero."""
    engine.deepspeed.module.zero_grad()
    run_step(engine, step)
    return torch.cat([gradient_of(engine, weight).double().flatten() for weight in local_weights(engine)])


@pytest.fixture(scope="module")
def inverse() -> dict[tuple[str, str], Found]:
    return run_distributed(inverse_errors, 1, CASES)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", INVERSE_TOLERANCE)
def test_inverse_stays_within_its_tolerance(inverse: dict[Any, Found], dtype: str, case: Case) -> None:
    check(dtype, case.name, inverse[dtype, case.name])


@pytest.mark.long
def test_inverse_stays_within_its_tolerance_after_steps_of_training() -> None:
    for (dtype, name), found in run_distributed(inverse_errors, 1, TRAINED)[0].items():
        check(dtype, name, found)


def check(dtype: str, name: str, found: Found) -> None:
    print(dtype, name, found)  # for docs/results.md
    assert found.guarded < INVERSE_TOLERANCE[dtype]
    assert (found.added > 0) == (dtype == "bf16" or name not in ("beta-1.0", "trained"))


def test_without_the_guard_small_betas_and_outputs_that_shrink_downward_would_ruin_the_gradient(
    inverse: dict[Any, Found],
) -> None:
    # at 0 the scale is the epsilon 1e-6, and seven divisions by it leave the range of fp32
    assert all(not inverse[dtype, "beta-0.0"].unguarded < 1 for dtype in INVERSE_TOLERANCE)
    assert inverse["bf16", "beta-0.3"].unguarded > 1
    assert all(inverse[dtype, "growing"].unguarded > INVERSE_TOLERANCE[dtype] for dtype in INVERSE_TOLERANCE)


def stale_plan() -> tuple[bool, bool, int]:
    """The betas change behind the engine's back, then an update notices."""
    config = dataclasses.replace(tiny_config({"num_layers": 9, "beta_init": 1.0}), recompute=INVERSE)
    engine = build_engine(config)
    run_step(engine)
    finite = all(bool(gradient_of(engine, w).isfinite().all()) for w in local_weights(engine))
    engine.deepspeed.module.zero_grad()
    for weight in local_weights(engine):
        if weight.name.endswith("beta"):
            weight.parameter.data.fill_(1e-5 if ".5." in weight.name else 1.0)
    run_step(engine)
    poisoned = any(bool(gradient_of(engine, w).isnan().any()) for w in local_weights(engine))
    engine.update()
    return finite, poisoned, engine.guard.added if engine.guard else -1


@pytest.mark.fault("GPU")
def test_a_plan_for_other_betas_gives_no_number_rather_than_a_wrong_one() -> None:
    finite, poisoned, added = run_distributed(stale_plan, 1)[0]
    assert finite
    assert poisoned
    assert added > 0
