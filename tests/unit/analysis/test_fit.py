"""A fit from sums over tokens against the outputs themselves: its error is what it says, and no other map is better."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_crnet.analysis.fit import Fit, damped, fit_map, truncated_svd

SHAPES = {"wide": (7, 12), "narrow": (12, 7), "square": (9, 9)}


def case(shape: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """X [tokens, d] of correlated columns, W^T [m, d] and P [tokens, m], partly a function of X."""
    d, m = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x = draw(150, d) @ draw(d, d)
    weight = draw(m, d)
    return x, weight, 0.6 * x @ weight.T + 0.3 * x @ draw(d, m) + draw(150, m)


def fitted(x: Tensor, weight: Tensor, p: Tensor | None, rank: int) -> Fit:
    cross = None if p is None else x.T @ p
    return fit_map(weight, x.T @ x, rank, cross, 0.0 if p is None else float(p.square().sum()))


def error_of(x: Tensor, weight: Tensor, p: Tensor, fit: Fit) -> float:
    left = x @ weight.T - fit.scale * p - x @ fit.a.T.double() @ fit.b.T.double()
    return float(left.norm() / (x @ weight.T).norm())


def best_error(x: Tensor, weight: Tensor, p: Tensor, s: float, rank: int) -> float:
    """By an orthonormal basis of X's columns: what lies outside, and the tail of an SVD inside."""
    q, _ = torch.linalg.qr(x)
    target = x @ weight.T - s * p
    inside = q.T @ target
    outside = target - q @ inside
    return float((outside.square().sum() + torch.linalg.svdvals(inside)[rank:].square().sum()).sqrt())


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_the_least_over_coefficients_and_maps(shape: str, rank: int) -> None:
    for seed in range(3):
        x, weight, p = case(shape, seed)
        fit = fitted(x, weight, p, rank)
        assert error_of(x, weight, p, fit) == pytest.approx(fit.error, rel=1e-5)
        whole = float((x @ weight.T).norm())
        grid = [best_error(x, weight, p, s, rank) / whole for s in torch.linspace(-1, 2.5, 351).tolist()]
        assert fit.error <= min(grid) * (1 + 1e-4)
        assert fit.error <= fit.plain_error == pytest.approx(best_error(x, weight, p, 0.0, rank) / whole)


def test_a_coefficient_that_helps_is_found() -> None:
    x, weight, _ = case("square", 1)
    noise = torch.randn(150, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    p = x @ weight.T + 1e-3 * noise  # as if the layers gave the same
    fit = fitted(x, weight, p, 2)
    assert fit.scale == pytest.approx(1.0, abs=0.02)
    assert fit.error < 1e-2 < fit.plain_error / 10


def test_where_the_best_coefficient_cannot_be_had_the_map_is_fitted_to_one_that_can() -> None:
    """s(beta) is not below cross_layer_epsilon."""
    x, weight, p = case("wide", 2)
    p -= x @ torch.linalg.lstsq(x, p).solution  # nothing of which helps
    assert abs(fitted(x, weight, p, 3).scale) < 0.1
    fit = fit_map(weight, x.T @ x, 3, x.T @ p, float(p.square().sum()), least_scale=0.1)
    assert fit.scale == 0.1
    assert error_of(x, weight, p, fit) == pytest.approx(fit.error, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_the_map_is_the_dense_one(shape: str) -> None:
    x, weight, p = case(shape, 1)
    fit = fitted(x, weight, p, min(SHAPES[shape]))
    assert fit.error < 1e-6
    assert fit.scale == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close((fit.b @ fit.a).double(), weight, rtol=1e-4, atol=1e-4)


def test_few_tokens_leave_the_rest_to_the_dense_weight() -> None:
    """Directions that no token shows are fitted as far as the rank allows."""
    x, weight, p = case("square", 1)
    few, before = x[:4], p[:4]
    fit = fit_map(weight, damped(few.T @ few, 1e-6), 9, few.T @ before, float(before.square().sum()))
    torch.testing.assert_close((fit.b @ fit.a).double(), weight, rtol=1e-3, atol=1e-3)


def test_factors_are_balanced() -> None:
    x, weight, p = case("wide", 2)
    fit = fitted(x, weight, p, 3)
    torch.testing.assert_close(fit.a @ fit.a.T, fit.b.T @ fit.b, rtol=1e-4, atol=1e-4)
    a, b = truncated_svd(weight, 3)
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-4, atol=1e-5)
    sizes = torch.linalg.svdvals(weight)
    assert float((b @ a - weight.float()).norm()) == pytest.approx(float(sizes[3:].norm()), rel=1e-5)
