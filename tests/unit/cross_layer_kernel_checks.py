"""Checks of the kernels on a device that runs them: a GPU, or the CPU under Triton's interpreter.

Not collected by itself: `test_cross_layer_kernels.py` starts it in a process with TRITON_INTERPRET, which Triton reads
when it is imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_crnet.config.schema import Config, RecomputeConfig
from megatron_crnet.distributed.process_groups import initialize_parallel, shutdown_parallel
from megatron_crnet.engine.inverse_guard import plan_inverse_segments
from megatron_crnet.model import residual_kernels as kernels
from megatron_crnet.model.gpt import CRNetModel, build_model_chunks
from megatron_crnet.model.linear import LowRankGroup
from megatron_crnet.model.lowrank import ProductOptions, low_rank_outputs, previous_outputs
from megatron_crnet.model.residual import EAGER, ResidualOps, working_kernels
from tests.helpers import make_batch, random_tokens, relative_error, tiny_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = ResidualOps(kernels.add_previous, kernels.gradients, kernels.remove_update)
DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Largest relative error of storing a number, to nearest."""
CUT = 2.0**-7
"""The same where bf16 is cut off, as in the interpreter; what is compiled rounds (`test_cross_layer_kernels.py`)."""
SHAPES = [(5, 3, 7), (4, 2, 64), (2, 1, 1040), (1, 1, 1), (37, 1, 33), (1, 2, 2049), (9, 1)]
"""Rows that fill no tile, columns that fill none, several tiles across, one element, a matrix."""


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def scalar(value: float) -> Tensor:
    """A scale as the model has it: not the first of its tensor."""
    return torch.tensor([0.0, value], device=DEVICE)[1]


def stored(residual: ResidualOps, dtype: torch.dtype) -> float:
    return CUT if residual is FUSED and DEVICE.type == "cpu" and dtype == torch.bfloat16 else ROUNDING[dtype]


def within(found: Tensor, exact: Tensor, slack: Tensor, rounding: float) -> bool:
    """Whether each number is `exact` (fp64) but for storing it, and for fp32 arithmetic on terms of size `slack`."""
    bound = rounding * exact.abs() + 2.0**-22 * slack + 1e-37
    return found.shape == exact.shape and bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("residual", [EAGER, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("size", [1.0, 1e18])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_are_exact_but_for_fp32_and_their_own_rounding(
    shape: tuple[int, ...], dtype: torch.dtype, size: float, residual: ResidualOps
) -> None:
    x, y = random(shape, dtype, 0, size), random(shape, dtype, 1, size)
    wide_x, wide_y, rounding = x.double(), y.double(), stored(residual, dtype)
    for s in (-0.7, 1e-6):
        scale = scalar(s)
        exact = scale.double()
        output, scaled = residual.add_previous(x, y, scale), wide_y * exact
        assert within(output, wide_x + scaled, wide_x.abs() + scaled.abs(), rounding)
        grad, grad_beta = residual.gradients(x, y, scale)
        assert within(grad, wide_x * exact, (wide_x * exact).abs(), rounding)
        products = wide_x * wide_y
        assert (grad_beta.double() - products.sum()).abs() <= 1e-6 * products.abs().sum()
        below = residual.remove_update(x, y, scale)
        assert within(below, (wide_x - wide_y) / exact, (wide_x.abs() + wide_y.abs()) / exact.abs(), rounding)
        assert (output.dtype, grad.dtype, below.dtype, grad_beta.dtype) == (dtype, dtype, dtype, torch.float32)
        assert grad_beta.shape == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest, -largest, torch.inf, torch.nan, 0.0], device=DEVICE).to(dtype)
    y = torch.tensor([largest, -largest, -torch.inf, 1.0, torch.nan], device=DEVICE).to(dtype)
    scale = scalar(1.5)
    pairs = [
        (FUSED.add_previous(x, y, scale), EAGER.add_previous(x, y, scale)),
        (FUSED.remove_update(x, -y, scale), EAGER.remove_update(x, -y, scale)),
        *zip(FUSED.gradients(x, y, scale), EAGER.gradients(x, y, scale), strict=True),
    ]
    for ours, theirs in pairs:
        assert torch.equal(ours.isnan(), theirs.isnan())
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 2, 8), (2, 0, 8), (2, 3, 0)])
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, device=DEVICE)
    grad, grad_beta = FUSED.gradients(x, x, scalar(1.0))
    assert FUSED.add_previous(x, x, scalar(1.0)).shape == FUSED.remove_update(x, x, scalar(1.0)).shape == shape
    assert (grad.shape, grad_beta.item()) == (shape, 0.0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a full-rank group's output": lambda x: torch.cat([x + 1, x, x + 2], dim=-1).split(x.shape[-1], dim=-1)[1],
    "one of a stack": lambda x: torch.stack([x + 1, x, x + 2]).unbind()[1],
    "batch first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns first": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "odd address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 2, 48), (6, 1, 48), (6, 2, 33), (16, 1, 33), (2, 2, 1040)])
def test_the_bits_do_not_depend_on_where_a_tensor_lies(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x, y, scale = random(shape, dtype, 0), random(shape, dtype, 1), scalar(0.9)
    elsewhere = LAYOUTS[layout](x), LAYOUTS[layout](y)
    assert torch.equal(elsewhere[0], x)
    assert torch.equal(FUSED.add_previous(*elsewhere, scale), FUSED.add_previous(x, y, scale))
    assert torch.equal(FUSED.remove_update(x, elsewhere[1], scale), FUSED.remove_update(x, y, scale))
    for found, wanted in zip(FUSED.gradients(*elsewhere, scale), FUSED.gradients(x, y, scale), strict=True):
        assert torch.equal(found, wanted)


def test_rows_of_a_wider_tensor_are_read_where_they_lie() -> None:
    whole = torch.zeros(4, 2, 3 * 64, dtype=torch.bfloat16, device=DEVICE)
    for part in (whole, *whole.split(64, dim=-1), *whole.view(4, 2, 3, 64).unbind(2)):
        assert kernels._rows(part).data_ptr() == part.data_ptr()
    expanded = torch.zeros(64, device=DEVICE).expand(4, 2, 64)
    assert kernels._rows(expanded).data_ptr() == expanded.data_ptr()


def test_rows_of_another_width_than_a_multiple_of_16_are_one_long_row() -> None:
    odd = torch.zeros(16, 2, 33, device=DEVICE)
    rows = kernels._rows(odd)
    assert (rows.shape, rows.stride(), rows.data_ptr()) == ((1, 1056), (1056, 1), odd.data_ptr())
    assert kernels._tiles(odd.shape) == (2, 1, 1024)


def test_what_triton_would_compile_another_way_is_copied() -> None:
    even, odd = torch.zeros(4, 2, 3 * 64, device=DEVICE), torch.zeros(4, 2, 48 + 33, device=DEVICE)
    parts = [even[..., 1:65], even.flatten()[1:129].view(4, 32), *odd.split([48, 33], dim=-1), even.transpose(0, 2)]
    for part in parts:
        rows = kernels._rows(part)
        assert torch.equal(rows, part.reshape(rows.shape))
        assert rows.shape == kernels._matrix(part.shape)
        assert rows.is_contiguous()
        assert (rows.data_ptr() % 16, rows.data_ptr() != part.data_ptr()) == (0, True)


def test_offsets_may_pass_two_to_the_31() -> None:
    # only the pages of three rows are ever touched
    stride = 2**30 + 16
    memory = torch.empty(2 * stride + 16, dtype=torch.bfloat16, device=DEVICE)
    far = memory.as_strided((3, 1, 16), (stride, stride, 1))
    near, scale = random((3, 1, 16), torch.bfloat16, 0), scalar(0.5)
    far.copy_(near)
    assert torch.equal(FUSED.add_previous(near, far, scale), FUSED.add_previous(near, near, scale))


def leaves(dtype: torch.dtype) -> list[Tensor]:
    """z, two stacks (three matrices of one shape, one of another), beta, four outputs below; some are views."""
    shapes = [(5, 2, 3 * 4 + 6), (3, 16, 4), (1, 9, 6)]
    below = [*random((5, 2, 48), dtype, 7).split(16, dim=-1), random((5, 2, 9), dtype, 8)]
    beta = torch.tensor([0.9, -0.4, 0.0, 1.1], device=DEVICE)
    tensors = [*(random(shape, dtype, seed) for seed, shape in enumerate(shapes)), beta, *below]
    return [x.detach().requires_grad_() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_autograd_function_gives_plain_autograds_gradients(dtype: torch.dtype) -> None:
    z, one, other, beta, *below = parameters = leaves(dtype)
    options = ProductOptions(epsilon=1e-6, residual=FUSED)
    ours = low_rank_outputs(z, [one, other], beta, below, options)
    exact = [x.detach().double().requires_grad_() for x in parameters]
    wide_z, wide_one, wide_other, wide_beta, *wide_below = exact
    parts = wide_z.split([4, 4, 4, 6], dim=-1)
    scales = torch.where(wide_beta < 0, wide_beta - 1e-6, wide_beta + 1e-6)
    expected = [
        s * y + part @ m.t() for s, y, part, m in zip(scales, wide_below, parts, [*wide_one, *wide_other], strict=True)
    ]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
    weights = [random(tuple(y.shape), dtype, 20 + i) for i, y in enumerate(ours)]
    found = torch.autograd.grad(ours, parameters, weights)
    wanted = torch.autograd.grad(expected, exact, [weight.double() for weight in weights])
    for x, y in zip((*ours, *found), (*expected, *wanted), strict=True):
        torch.testing.assert_close(x.double(), y, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_outputs_below_come_back(dtype: torch.dtype) -> None:
    z, one, other, _, *below = (x.detach() for x in leaves(dtype))
    beta = torch.tensor([0.9, -0.4, 0.5, 1.1], device=DEVICE)
    options = ProductOptions(epsilon=0.0, residual=FUSED)
    outputs = low_rank_outputs(z, [one, other], beta, below, options)
    found = previous_outputs(z, [one, other], beta, outputs, options)
    for x, y in zip(found, below, strict=True):
        assert (x - y).norm() / y.norm() < 8 * stored(FUSED, dtype)


@pytest.mark.parametrize("width", [3, 48, 1040, 5461])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_try_at_start_up_passes(dtype: torch.dtype, width: int) -> None:
    residual = working_kernels(DEVICE, dtype, width)
    assert residual.add_previous is kernels.add_previous


class Counted:
    """The kernels, and how often each operation was asked for."""

    def __init__(self) -> None:
        self.calls = dict.fromkeys(("add_previous", "gradients", "remove_update"), 0)
        self.residual = ResidualOps(*(self._counting(name) for name in self.calls))

    def _counting(self, name: str) -> Callable[..., Any]:
        def call(*args: Tensor) -> Any:
            self.calls[name] += 1
            return getattr(FUSED, name)(*args)

        return call


@pytest.fixture(scope="module")
def groups() -> Iterator[None]:
    initialize_parallel(tiny_config())
    yield
    shutdown_parallel()


Found = tuple[Tensor, dict[str, Tensor]]


@torch.no_grad()
def plan_for_sizes(model: CRNetModel, batch: dict[str, Tensor]) -> None:
    """Plan segments as the engine does before its first step: by the norms of outputs that a pass has recorded.

    A plan for outputs of equal size lets the error of this model in bf16 pass twice the tolerance, by 1% where numbers
    are rounded to nearest; then the guard gives NaN, as it must.
    """
    betas = {
        group: group.beta for group in model.modules() if isinstance(group, LowRankGroup) and group.beta is not None
    }
    plan_inverse_segments([model.decoder], betas, DEVICE)
    model.token_losses(batch)
    plan_inverse_segments([model.decoder], betas, DEVICE)


def loss_and_gradients(
    config: Config, residual: ResidualOps, plan: Callable[[CRNetModel, dict[str, Tensor]], None] = plan_for_sizes
) -> Found:
    (model,) = build_model_chunks(config)
    assert isinstance(model, CRNetModel)
    for group in model.modules():
        if isinstance(group, LowRankGroup):
            group.residual = residual
    batch = {name: x.to(DEVICE) for name, x in make_batch(*random_tokens(config)).items()}
    if config.recompute.strategy == "inverse":
        plan(model, batch)
    loss = model.token_losses(batch).mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(one: Found, other: Found) -> float:
    return relative_error((name, one[1][name], wanted, wanted) for name, wanted in other[1].items())


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-5), ("bf16", 0.1)])
@pytest.mark.usefixtures("groups")
def test_a_model_trains_on_them_and_recomputes_the_same_bits(dtype: str, bound: float) -> None:
    config = tiny_config(
        training={"dtype": dtype, "global_batch_size": 2}, deepspeed_section={"zero_optimization": {"stage": 1}}
    )
    plain, found, calls = loss_and_gradients(config, EAGER), {}, {}
    inverted = dataclasses.replace(config, recompute=RecomputeConfig(strategy="inverse"))
    assert difference(loss_and_gradients(inverted, EAGER), plain) < bound
    for strategy in ("none", "replay", "full", "inverse"):
        counted = Counted()
        recomputed = dataclasses.replace(config, recompute=RecomputeConfig(strategy=strategy))
        found[strategy], calls[strategy] = loss_and_gradients(recomputed, counted.residual), counted.calls
        assert difference(found[strategy], plain) < bound, strategy
        assert found[strategy][0].item() == pytest.approx(plain[0].item(), rel=bound)
    for strategy in ("replay", "full"):
        assert torch.equal(found[strategy][0], found["none"][0])
        assert difference(found[strategy], found["none"]) == 0.0, strategy
    # of three layers with seven positions; `replay` need not rebuild the last one
    passes = {name: [n[operation] / 21 for operation in n] for name, n in calls.items()}
    assert passes["none"] == [1, 1, 0]
    assert passes["full"] == [2, 1, 0]
    assert passes["replay"] == [pytest.approx(5 / 3), 1, 0]
    # the pass that records norms comes before; in bf16 they ask for a checkpoint, whose outputs are kept
    assert passes["inverse"] == [2, 1, pytest.approx(1 if dtype == "fp32" else 2 / 3)]


@pytest.mark.fault("GPU")
@pytest.mark.usefixtures("groups")
def test_a_plan_for_outputs_of_equal_size_is_caught_by_the_guard() -> None:
    """With such a plan the gradients of this model in bf16 were not finite on CUDA, which rounds to nearest.

    The interpreter cuts them off and stays just below the guard's bound, which is why it was met on a GPU alone; the
    plain functions on a CPU round as a GPU does.
    """
    config = tiny_config(
        training={"dtype": "bf16", "global_batch_size": 2}, deepspeed_section={"zero_optimization": {"stage": 1}}
    )
    inverted = dataclasses.replace(config, recompute=RecomputeConfig(strategy="inverse"))
    even = {layer: torch.ones(7) for layer in range(1, config.model.num_layers)}

    def equal_sizes(model: CRNetModel, batch: dict[str, Tensor]) -> None:
        model.decoder.plan_inverse_segments(even, even)

    _, unplanned = loss_and_gradients(inverted, EAGER, equal_sizes)
    assert not unplanned["embedding.word_embeddings.weight"].isfinite().all()
    _, planned = loss_and_gradients(inverted, EAGER)
    assert all(gradient.isfinite().all() for gradient in planned.values())
