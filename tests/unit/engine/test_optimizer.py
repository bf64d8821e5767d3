from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from megatron_crnet.engine.optimizer import (
    build_optimizer,
    build_scheduler,
    count_groups,
    lr_multiplier,
    parameter_groups,
)
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import ARCHITECTURES, tiny_config


def _rates(steps: int, **optimizer: object) -> list[float]:
    config = tiny_config(training={"train_steps": steps}, optimizer={"lr": 1.0, **optimizer})
    adamw = build_optimizer([{"params": [torch.zeros(1, requires_grad=True)]}], config.optimizer)
    scheduler, rates = build_scheduler(config, adamw), []
    for _ in range(steps):
        rates.append(adamw.param_groups[0]["lr"])
        scheduler.step(1)
    return rates


def test_cosine_warms_up_and_ends_at_the_minimum() -> None:
    rates = _rates(100, lr_warmup_steps=10, min_lr_ratio=0.1)
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * (k - 10) / 90)) for k in range(11, 101)]
    assert rates[10:] == pytest.approx(expected)


def test_warmup_stable_decay_is_flat_then_falls() -> None:
    rates = _rates(100, lr_decay_style="wsd", lr_warmup_steps=10, lr_wsd_decay_steps=20, min_lr_ratio=0.0)
    assert rates[10:80] == pytest.approx([1.0] * 70)
    assert rates[80:] == pytest.approx([1 - (k + 1) / 20 for k in range(20)])


def test_constant_stays() -> None:
    assert _rates(20, lr_decay_style="constant", lr_warmup_steps=0) == pytest.approx([1.0] * 20)


def _shapes(*, partial_apart: bool, **parameters: torch.Tensor) -> list[tuple[float, list[int]]]:
    """Weight decay and numbers of elements of every group; parameters named partial... have partial gradients."""
    module = torch.nn.ParameterDict(parameters)
    for name, parameter in module.items():
        parameter.sequence_parallel = name.startswith("partial")
    groups = parameter_groups([module], weight_decay=0.1, partial_apart=partial_apart)
    return [(g["weight_decay"], sorted(p.numel() for p in g["params"])) for g in groups]


LOW_RANK = {
    "matrix": torch.zeros(2, 2),
    "partial_matrix": torch.zeros(4, 4),
    "partial_norm": torch.zeros(2),
    "beta": torch.zeros(3),
}
FULL_RANK = {"matrix": torch.zeros(2, 2), "partial_norm": torch.zeros(2)}


def test_only_matrices_decay() -> None:
    assert _shapes(partial_apart=False, **LOW_RANK) == [(0.0, [2, 3]), (0.1, [4, 16])]


def test_partial_gradients_get_groups_of_their_own() -> None:
    assert _shapes(partial_apart=True, **LOW_RANK) == [(0.0, [3]), (0.0, [2]), (0.1, [4]), (0.1, [16])]


def test_every_pipeline_stage_has_the_same_groups_whatever_its_layers() -> None:
    low, full = _shapes(partial_apart=False, **LOW_RANK), _shapes(partial_apart=False, **FULL_RANK)
    assert [decay for decay, _ in low] == [decay for decay, _ in full] == [0.0, 0.1]


def test_a_multiplier_scales_the_whole_schedule_of_its_group() -> None:
    config = tiny_config(training={"train_steps": 20}, optimizer={"lr": 1.0, "lr_warmup_steps": 5})
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr_mult": factor} for factor in (1.0, 0.25)]
    adamw = build_optimizer(groups, config.optimizer)
    scheduler, rates = build_scheduler(config, adamw), []
    for _ in range(20):
        rates.append([group["lr"] for group in adamw.param_groups])
        assert scheduler.get_lr({}) == rates[-1][0]
        scheduler.step(1)
    assert [rate for _, rate in rates] == pytest.approx([rate / 4 for rate, _ in rates])


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("model.embed_tokens.weight", 2.0),
        ("lm_head.weight", 1.0),
        ("model.layers.0.mlp.up_proj.weight", 3.0),
        ("model.layers.0.mlp.up_proj.a.weight", 15.0),
        ("model.layers.0.input_layernorm.weight", 1.0),
        ("model.layers.10.mlp.up_proj.b.weight", 7.0),
        ("model.layers.1.mlp.up_proj.beta", 0.0),
    ],
)
def test_the_multiplier_of_a_weight_is_the_product_of_its_parts(name: str, factor: float) -> None:
    assert lr_multiplier(name, {"embedding": 2.0, "first_layer": 3.0, "a": 5.0, "b": 7.0, "beta": 0.0}) == factor


def test_stages_with_fewer_groups_divide_some_and_refuse_what_cannot_be_divided() -> None:
    module = torch.nn.ParameterDict(FULL_RANK)
    some = {"first_layer": 0.5, "beta": 2.0, "a": 1.0}
    assert count_groups(tiny_config()) == 2
    assert count_groups(tiny_config(optimizer={"lr_multipliers": some})) == 4
    assert count_groups(tiny_config({"variant": "full_rank"}, optimizer={"name": "galore", "galore_rank": 4})) == 3
    moe = {**ARCHITECTURES["qwen3_moe"], "variant": "low_rank"}
    # the first layer's router, its factors, other weights, other factors; vectors
    multipliers = {"lr_multipliers": {"first_layer": 0.5, "a": 3.0, "b": 3.0}}
    assert count_groups(tiny_config(moe, optimizer=multipliers)) == 5
    # and of experts that are spread over replicas both kinds of factors
    assert count_groups(tiny_config(moe, {"expert_model_parallel_size": 2}, optimizer=multipliers)) == 7
    # with full-rank experts: attention's two kinds of factors, experts, other weights, the first router, vectors
    mixed = {"lr_multipliers": {"first_layer": 0.5, "a": 3.0, "b": 4.0}}
    full_rank_experts = {**moe, "full_rank_experts": True}
    assert count_groups(tiny_config(full_rank_experts, {"expert_model_parallel_size": 2}, optimizer=mixed)) == 9
    crnet = {**moe, "variant": "crnet"}
    # both have groups of vectors, of matrices, and of matrices of experts
    for model in (moe, crnet):
        assert count_groups(tiny_config(model, {"expert_model_parallel_size": 2})) == 3
    found = parameter_groups([module, torch.nn.ParameterDict({"other": torch.zeros(5, 5)})], 0.1, at_least=3)
    assert [(g["weight_decay"], len(g["params"])) for g in found] == [(0.0, 1), (0.1, 1), (0.1, 1)]
    with pytest.raises(ConfigError, match=r"optimizer\.lr_multipliers needs 3 groups .* one has only 2 parameters"):
        parameter_groups([module], 0.1, at_least=3)


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_masters_get_an_optimizer_that_works_on_the_host(
    offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    apex = types.SimpleNamespace(FusedAdam=lambda groups, **_: "apex")
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    parameters = [{"params": [torch.zeros(1, requires_grad=True)]}]
    found = build_optimizer(parameters, tiny_config().optimizer, on_host=offload)
    if offload:
        assert type(found) is torch.optim.AdamW
        assert not found.defaults["fused"]
    else:
        assert found == "apex"
