"""The pure functions against plain autograd, and compiled against themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_crnet.config.recompute_section import RecomputeConfig
from megatron_crnet.distributed.process_groups import initialize_parallel, shutdown_parallel
from megatron_crnet.engine.inverse_guard import InverseGuard
from megatron_crnet.model import compiled as module
from megatron_crnet.model import glue as plain_functions
from megatron_crnet.model.compiled import choose_glue, tensors_of, trial_inputs, working_glue
from megatron_crnet.model.glue import EAGER, Glue, signed_scale
from megatron_crnet.model.gpt import CRNetModel, build_model_chunks
from megatron_crnet.model.linear import LowRankGroup
from megatron_crnet.model.lowrank import ProductOptions, low_rank_outputs, previous_outputs
from megatron_crnet.model.regions import HeadNorms, Norm, Regions
from megatron_crnet.model.residual_product import ResidualProduct
from megatron_crnet.planning.counters import OperationCounter
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import make_batch, random_tokens, relative_error, tiny_config

CPU = torch.device("cpu")
EPS = 1e-6
S, B, HEADS, D = 5, 2, 3, 4
SHAPE = (S, B, HEADS * D)


@pytest.mark.parametrize(("beta", "scale"), [(0.5, 0.5 + EPS), (-0.5, -0.5 - EPS), (0.0, EPS), (-0.0, EPS)])
def test_the_scale_keeps_the_sign_and_is_never_zero(beta: float, scale: float) -> None:
    assert signed_scale(torch.tensor(beta, dtype=torch.float64), EPS).item() == pytest.approx(scale, abs=1e-15)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (HEADS, D)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


Function = Callable[..., Sequence[Tensor]]
"""From betas, a bias and outputs to what a layer uses of them, and s(beta) Y for the next layer."""


def plain(use: Callable[..., Sequence[Tensor]]) -> Function:
    def function(betas: Tensor, bias: Tensor, *outputs: Tensor) -> Sequence[Tensor]:
        return [*use(bias, *outputs), *(s * y for s, y in zip(signed_scale(betas, EPS), outputs, strict=True))]

    return function


def by_regions(use: Callable[..., tuple[Any, Sequence[Tensor]]], receives: bool) -> Function:
    """What hands an output on returns for it the gradient of s(beta) Y, unscaled, as the next layer's products do."""
    identity = torch.eye(HEADS * D)

    def function(betas: Tensor, bias: Tensor, *outputs: Tensor) -> Sequence[Tensor]:
        regions = Regions(EAGER, EPS)
        used, carried = use(regions, None if receives else betas, bias, *outputs)
        if receives:
            carried = regions.receive(betas, carried)
        options = ProductOptions(regions=Regions(EAGER, EPS))
        matrices = [identity.expand(len(carried), -1, -1).contiguous()]
        z = torch.zeros(S, B, HEADS * D * len(carried))
        following = low_rank_outputs(z, matrices, betas.detach(), carried, options)
        return [*(used if isinstance(used, tuple) else (used,)), *following]

    return function


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.unflatten(-1, (HEADS, D)), (D,), weight, EPS).flatten(-2)


ANGLES = random(S, 1, 1, D // 2, seed=9)
ROTATION = ANGLES.cos(), ANGLES.sin()
REGIONS = {
    "rotary": (
        3,
        lambda _, q, k, v: (exact_rotate(q, *ROTATION), exact_rotate(k, *ROTATION), v),
        lambda regions, betas, _, q, k, v: regions.rotary(ROTATION, None, betas, q, k, v),
    ),
    "rotary after norms": (
        3,
        lambda bias, q, k, v: (
            exact_rotate(exact_norm(q, bias[:D]), *ROTATION),
            exact_rotate(exact_norm(k, bias[-D:]), *ROTATION),
            v,
        ),
        lambda regions, betas, bias, q, k, v: regions.rotary(
            ROTATION, HeadNorms(bias[:D], bias[-D:], EPS), betas, q, k, v
        ),
    ),
    "swiglu": (
        2,
        lambda _, gate, up: (F.silu(gate) * up,),
        lambda regions, betas, _, gate, up: regions.swiglu(betas, gate, up),
    ),
    "gelu": (
        1,
        lambda bias, up: (F.gelu(up + bias, approximate="tanh"),),
        lambda regions, betas, bias, up: regions.gelu(betas, bias, up),
    ),
    "gelu without a bias": (
        1,
        lambda _, up: (F.gelu(up, approximate="tanh"),),
        lambda regions, betas, _, up: regions.gelu(betas, None, up),
    ),
    "carry": (1, lambda _, y: (y,), lambda regions, betas, _, y: regions.carry(betas, None, y)),
    "carry with biases": (
        2,
        lambda bias, v, o: (v + bias, o + 2 * bias),
        lambda regions, betas, bias, v, o: regions.carry(betas, torch.cat((bias, 2 * bias)), v, o),
    ),
}


@pytest.mark.parametrize("receives", [False, True], ids=["scaled by this layer", "scaled by the next"])
@pytest.mark.parametrize("name", REGIONS)
def test_values_and_gradients_of_a_region_and_the_next_layers_residual_are_plain_autograds(
    name: str, receives: bool
) -> None:
    count, exact, region = REGIONS[name]
    betas = torch.tensor([0.9, -0.4, 0.0])[:count]
    leaves = [betas, random(HEADS * D, seed=8), *(random(*SHAPE, seed=seed) for seed in range(count))]
    found, wanted = [], []
    for results, function in ((wanted, plain(exact)), (found, by_regions(region, receives))):
        mine = [leaf.clone().requires_grad_() for leaf in leaves]
        outputs = function(*mine)
        weights = [random(*y.shape, seed=20 + i) for i, y in enumerate(outputs)]
        results += [*outputs, *torch.autograd.grad(outputs, mine, weights, materialize_grads=True)]
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["swiglu_backward", "gelu_backward"])
def test_an_activations_gradients_are_the_same_by_few_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, function = trial_inputs(CPU, torch.bfloat16)[name], getattr(EAGER, name)
    at_once = function(*inputs)
    monkeypatch.setattr(plain_functions, "FEW", 3 * inputs[1][0].numel())
    for x, y in zip(function(*inputs), at_once, strict=True):
        if x.shape == inputs[1].shape:
            assert torch.equal(x, y)
        torch.testing.assert_close(x, y)  # sums over rows to rounding


def test_a_gate_without_silu_is_a_product() -> None:
    leaves = [random(*SHAPE, seed=seed) for seed in (0, 1)]
    results = []
    for product in (lambda gate, up: gate * up, lambda *x: Regions(activates=False).swiglu(None, *x)[0]):
        mine = [leaf.clone().requires_grad_() for leaf in leaves]
        y = product(*mine)
        results.append([y, *torch.autograd.grad(y, mine, random(*SHAPE, seed=5))])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize(("exact", "weights"), [(F.rms_norm, 1), (F.layer_norm, 2)])
def test_a_norm_adds_the_streams_gradient(exact: Callable[..., Tensor], weights: int) -> None:
    leaves = [random(*SHAPE, seed=0), *(random(HEADS * D, seed=seed) for seed in range(1, 1 + weights))]
    results = []
    for norm in (
        lambda x, *w: (exact(x, w[0].shape, *w, eps=1e-5), x),
        lambda x, *w: Norm.apply(EAGER, x, *w, 1e-5),
    ):
        mine = [leaf.clone().requires_grad_() for leaf in leaves]
        outputs = norm(*mine)
        grads = [random(*SHAPE, seed=5), random(*SHAPE, seed=6)]
        results.append([*outputs, *torch.autograd.grad(outputs, mine, grads)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_bf16_outputs_see_the_whole_precision_of_beta() -> None:
    # bf16 holds 1.0 and 1.0078, nothing between
    previous = torch.full((4, 1, 8), 100.0, dtype=torch.bfloat16)
    (result,) = EAGER.scaled((previous,), torch.tensor([1.004]), 0.0)
    assert result.dtype == torch.bfloat16
    assert result.unique().tolist() == [torch.tensor(100.4).bfloat16().item()]


def test_beta_gets_an_fp32_gradient_summed_in_fp32() -> None:
    y = torch.full((64, 1, 64), 1 / 256, dtype=torch.bfloat16)
    _, grad_beta = EAGER.add_carried(torch.zeros_like(y), torch.ones_like(y), y, torch.tensor(1.0), EPS)
    assert grad_beta.item() == pytest.approx(64 * 64 / 256, rel=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_residual_can_be_undone_to_rounding(dtype: torch.dtype, bound: float) -> None:
    z, matrices = random(S, B, 6, seed=0, dtype=dtype), [random(2, 7, 3, seed=1, dtype=dtype)]
    previous, betas = [random(S, B, 7, seed=seed, dtype=dtype) for seed in (2, 3)], torch.tensor([0.9, -0.7])
    outputs = low_rank_outputs(z, matrices, betas, previous)
    found = previous_outputs(z, matrices, betas, outputs, ProductOptions())
    for x, y in zip(found, previous, strict=True):
        assert x.dtype == dtype
        assert (x - y).norm() / y.norm() < bound


def test_gradients_that_are_shared_are_not_overwritten() -> None:
    """The residual stream's gradient goes on to other functions; logits go nowhere else."""
    for name, inputs in trial_inputs(CPU, torch.float32).items():
        if name.endswith("_"):
            continue
        before = [x.clone() for x in inputs if isinstance(x, Tensor)]
        getattr(EAGER, name)(*inputs)
        assert all(torch.equal(x, y) for x, y in zip(before, (x for x in inputs if isinstance(x, Tensor)), strict=True))


# Compiled by Inductor: for the CPU here, whose compiler also keeps casts and takes shapes as they are.


@pytest.fixture(scope="module")
def compiled() -> Glue:
    return working_glue(CPU, torch.bfloat16)


@pytest.fixture(scope="module")
def groups() -> Iterator[None]:
    initialize_parallel(tiny_config())
    yield
    shutdown_parallel()


def test_elementwise_results_in_bf16_are_the_same_bits_compiled(compiled: Glue) -> None:
    inputs = trial_inputs(CPU, torch.bfloat16)
    for name in ("rotate", "scaled", "unscaled"):
        found, wanted = (getattr(glue, name)(*inputs[name]) for glue in (compiled, EAGER))
        for x, y in zip(tensors_of(found), tensors_of(wanted), strict=True):
            assert torch.equal(x, y), name


def gradients(strategy: str, glue: Glue, residual: ResidualProduct | None = None) -> dict[str, Tensor]:
    config = tiny_config(
        training={"dtype": "bf16", "global_batch_size": 2}, deepspeed_section={"zero_optimization": {"stage": 1}}
    )
    (model,) = build_model_chunks(dataclasses.replace(config, recompute=RecomputeConfig(strategy=strategy)))
    assert isinstance(model, CRNetModel)
    for part in model.modules():
        if hasattr(part, "glue"):
            part.glue = glue
        if hasattr(part, "regions"):
            part.regions = dataclasses.replace(part.regions, glue=glue, residual=residual)
    batch = make_batch(*random_tokens(config))
    if strategy == "inverse":
        betas = {g: g.beta for g in model.modules() if isinstance(g, LowRankGroup) and g.beta is not None}
        guard = InverseGuard([model.decoder], CPU)
        guard.plan(betas)
        with torch.no_grad():
            model.token_losses(batch)
        guard.plan(betas)
    loss = model.token_losses(batch).mean()
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def added_in_fp32(z: Tensor, b: Tensor, previous: Tensor, beta: Tensor, eps: float) -> Tensor:
    """What the kernel of `model/residual_product.py` computes."""
    product = (z.float() @ b.float().t()).view(previous.shape)
    return (signed_scale(beta, eps) * previous.float() + product).to(previous.dtype)


@pytest.mark.long  # each shape is compiled by itself
@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize(
    ("residual", "strategies"),
    [
        pytest.param(added_in_fp32, ("replay", "full", "inverse"), id="with the product"),
        pytest.param(None, ("replay", "full", "inverse"), id="in two passes"),
    ],
)
def test_a_model_with_compiled_regions_recomputes_the_same_bits(
    residual: ResidualProduct | None, strategies: tuple[str, ...], compiled: Glue
) -> None:
    found = {strategy: gradients(strategy, compiled, residual) for strategy in ("none", *strategies)}
    plain = gradients("none", EAGER)
    for strategy in {"replay", "full"} & found.keys():
        assert all(torch.equal(found[strategy][name], x) for name, x in found["none"].items()), strategy
    for strategy in {"none", "inverse"} & found.keys():
        assert relative_error((name, found[strategy][name], x, x) for name, x in plain.items()) < 0.1, strategy


def test_a_compiled_function_runs_as_it_is_while_operations_are_counted() -> None:
    inputs = trial_inputs(CPU, torch.bfloat16)["swiglu"]
    with OperationCounter():  # under which PyTorch refuses to compile
        found = module.compiled(EAGER.swiglu)(*inputs)
    assert torch.equal(found, EAGER.swiglu(*inputs))


def test_fake_tensors_and_cpus_take_the_plain_functions() -> None:
    assert choose_glue(torch.empty(2), fusion=True) is EAGER


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda function: lambda *args: _wrong(function(*args)), "norm compiled on cpu gives other numbers"),
    ],
    ids=["computes something else"],
)
def test_a_compiler_that_fails_ends_the_run_with_one_line(
    made: Callable[..., Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "compiled", made)
    with pytest.raises(ConfigError) as raised:
        working_glue.__wrapped__(CPU, torch.float32)
    assert words in str(raised.value)
    assert "set training.cross_layer_fusion false" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_region_that_cannot_be_compiled_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **keywords: Any) -> Any:
        raise OSError("no space\non the device")

    monkeypatch.setattr(torch, "compile", lambda function, **keywords: fails)
    with pytest.raises(ConfigError) as raised:
        module.compiled(lambda x: x)(torch.ones(1))
    assert "torch.compile does not work here (OSError: no space on the device)" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_try_gives_both_the_same_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compiled", lambda function: function)
    assert working_glue.__wrapped__(CPU, torch.float32) == EAGER


def _wrong(found: Any) -> Any:
    return tuple(x + 1 for x in found) if isinstance(found, tuple) else found + 1


def chosen(model: CRNetModel) -> list[Glue]:
    parts = [
        *(getattr(m, "glue", None) for m in model.modules()),
        *(getattr(m, "regions", None) for m in model.modules()),
    ]
    return [part.glue if isinstance(part, Regions) else part for part in parts if part is not None]


@pytest.mark.usefixtures("groups")
def test_every_part_of_a_model_takes_the_compiled_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = EAGER.map(lambda name, function: lambda *args: function(*args))
    monkeypatch.setattr(module, "compiles", lambda device, fusion: fusion)
    monkeypatch.setattr(module, "working_glue", lambda device, dtype: fake)
    config = tiny_config(training={"global_batch_size": 2})
    (model,) = build_model_chunks(config)
    found = chosen(model)
    # two norms and the final one, four groups (a full-rank layer has none) and a layer's regions, the loss
    layers = config.model.num_layers
    assert len(found) == 2 * layers + 1 + 4 * (layers - 1) + layers + 1
    assert all(glue is fake for glue in found)


def test_what_is_compiled_serves_other_threads_and_counters() -> None:
    """Backward runs in a thread of autograd's own, with shapes that the main thread has not met."""
    region = module.compiled(lambda x: (x * 2, None))
    inputs = [torch.ones(size) for size in range(1, 12)]
    with ThreadPoolExecutor(1) as pool:
        assert all(torch.equal(y, 2 * x) for x, (y, _) in zip(inputs, pool.map(region, inputs), strict=True))
    with OperationCounter():
        assert torch.equal(region(torch.ones(20))[0], torch.full((20,), 2.0))
    assert torch.equal(region(torch.ones(21))[0], torch.full((21,), 2.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regions_compile_on_a_gpu(dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    glue = working_glue(device, dtype)
    for name in trial_inputs(device, dtype):
        once, again = (tensors_of(getattr(glue, name)(*trial_inputs(device, dtype)[name])) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True)), name


MORE_KERNELS = {
    # a small one per sum over all tokens: of betas, biases and weights
    **dict.fromkeys(("norm_backward", "rotate_backward", "add_carried", "carried_backward"), 2),
    **dict.fromkeys(("layer_norm_backward", "swiglu_backward", "biased_backward"), 3),
    **{"norm_rotate_backward": 4, "gelu_backward": 5},
    # one per output, or the label's logit before exponentials take its place
    **dict.fromkeys(("scaled", "unscaled", "exponentials_"), 2),
}


@pytest.mark.gpu
def test_a_region_is_one_kernel_and_one_per_sum_on_a_gpu() -> None:
    """So Inductor of PyTorch 2.11 and 2.13 makes them for sm_90."""
    from torch._inductor import config, metrics

    device, found = torch.device("cuda", torch.cuda.current_device()), {}
    torch._dynamo.reset()
    with config.patch(force_disable_caches=True):
        for name, inputs in trial_inputs(device, torch.bfloat16, rows=4096, heads=16, d=64).items():
            before = metrics.generated_kernel_count
            module.compiled(getattr(EAGER, name))(*inputs)
            found[name] = metrics.generated_kernel_count - before
    assert {name: count for name, count in found.items() if count > MORE_KERNELS.get(name, 1)} == {}
