"""Initial values as method.md gives them, and the errors of loading."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import pytest
import torch

from megatron_crnet.config.megatron import build_transformer_config
from megatron_crnet.distributed.process_groups import initialize_parallel, shutdown_parallel
from megatron_crnet.model.gpt import CRNetModel, build_model_chunks
from megatron_crnet.model.weights import canonical_weights, initial_value, load_canonical
from megatron_crnet.utils.errors import CheckpointError
from tests.helpers import tiny_config

CONFIG = tiny_config(model={"hidden_size": 256, "ffn_hidden_size": 384, "rank": 64, "init_method_std": 0.02})


@pytest.fixture(scope="module")
def model() -> Any:
    initialize_parallel(CONFIG)
    yield build_model_chunks(CONFIG)[0]
    shutdown_parallel()


def _value(model: CRNetModel, name: str) -> torch.Tensor:
    return next(weight.local().detach() for weight in canonical_weights(model) if weight.name == name)


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("model.embed_tokens.weight", 0.02),
        ("lm_head.weight", 0.02),
        ("model.layers.0.self_attn.q_proj.weight", 0.02),
        ("model.layers.1.self_attn.q_proj.a.weight", 256**-0.5),
        ("model.layers.1.mlp.down_proj.a.weight", 384**-0.5),
        ("model.layers.1.mlp.up_proj.b.weight", 0.02 * (256 / 64) ** 0.5),
        ("model.layers.1.mlp.down_proj.b.weight", 0.02 * (384 / 64) ** 0.5),
    ],
)
def test_standard_deviations(model: CRNetModel, name: str, std: float) -> None:
    assert _value(model, name).std().item() == pytest.approx(std, rel=0.03)


def test_threads_draw_the_same_values(model: CRNetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        (again,) = build_model_chunks(CONFIG)
        for weight, known in zip(canonical_weights(again), canonical_weights(model), strict=True):
            assert torch.equal(weight.local(), known.local()), weight.name


def test_the_product_of_the_factors_looks_like_a_full_rank_weight(model: CRNetModel) -> None:
    a, b = (_value(model, f"model.layers.2.mlp.gate_proj.{factor}.weight") for factor in "ab")
    assert (b @ a).std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("layer", [0, 2])
def test_scaled_residual_init_shrinks_what_is_added_to_the_residual_stream_and_nothing_else(layer: int) -> None:
    plain, scaled = (
        build_transformer_config(dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **changes)))
        for changes in ({}, {"scale_residual_init": True})
    )
    kinds = {"weight": (256, 256)} if layer == 0 else {"a.weight": (64, 256), "b.weight": (256, 64)}
    for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        for kind, shape in kinds.items():
            before, after = (
                initial_value(f"model.layers.{layer}.{module}.{kind}", shape, c, 1) for c in (plain, scaled)
            )
            shrinks = module.endswith(("o_proj", "down_proj")) and kind != "a.weight"
            torch.testing.assert_close(after, before * (8**-0.5 if shrinks else 1.0))


def test_beta_and_norms_are_constant_and_no_two_weights_are_alike(model: CRNetModel) -> None:
    assert _value(model, "model.layers.1.self_attn.q_proj.beta").item() == pytest.approx(0.9)
    assert _value(model, "model.norm.weight").unique().tolist() == [1.0]
    matrices = [w.local().flatten()[:8] for w in canonical_weights(model) if len(w.shape) == 2]
    assert len({tuple(m.tolist()) for m in matrices}) == len(matrices)


def test_a_missing_or_misshapen_weight_is_an_error(model: CRNetModel) -> None:
    weights = {w.name: torch.zeros(w.shape) for w in canonical_weights(model)}
    name = "model.layers.1.mlp.up_proj.a.weight"
    with pytest.raises(CheckpointError, match=f"{name} has the shape"):
        load_canonical(model, {**weights, name: torch.zeros(3, 3)})
    del weights[name]
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_canonical(model, weights)


def test_every_seed_draws_other_values(model: CRNetModel) -> None:
    name = "model.layers.1.mlp.up_proj.a.weight"
    drawn = [initial_value(name, (8, 32), model.config, seed) for seed in (0, 1, 1234)]
    assert torch.equal(drawn[0], initial_value(name, (8, 32), model.config, 0))
    assert not any(torch.equal(one, other) for one, other in combinations(drawn, 2))
