"""Errors and the best coefficient from sums alone are those of SVDs of the outputs themselves, over a fine grid."""

from __future__ import annotations

import pytest
import torch

from tests.unit.analysis.products import difference_of, low_rank_error, outputs


@pytest.mark.parametrize("rank", [0, 1, 4, 10])
@pytest.mark.parametrize("s", [-0.7, 0.0, 1.3])
def test_an_error_is_that_of_the_svd(rank: int, s: float) -> None:
    y, p = outputs(1)
    found = difference_of(y, p)
    wanted = low_rank_error(y - s * p, rank)
    assert found.error(s, rank) == pytest.approx(wanted, rel=1e-9, abs=1e-9 * found.norms[0])
    error, basis = found.solve(s, rank)
    left = (y - s * p) - (y - s * p) @ basis @ basis.T
    assert error == pytest.approx(float(left.square().sum()), rel=1e-9, abs=1e-9 * found.norms[0])
    sizes = torch.linalg.svdvals(y - s * p)
    torch.testing.assert_close(found.energies(s).sqrt(), sizes, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("seed", range(6))
def test_the_best_coefficient_is_that_of_a_fine_grid(seed: int) -> None:
    y, p = outputs(seed)
    found = difference_of(y, p)
    for rank in (1, 3, 6):
        grid = min(low_rank_error(y - s * p, rank) for s in torch.linspace(-1.5, 2.5, 401).tolist())
        assert low_rank_error(y - found.best_scale(rank) * p, rank) <= grid + 1e-5 * found.norms[0]


def test_a_previous_output_never_makes_it_worse() -> None:
    for seed in range(6):
        y, _ = outputs(seed)
        p = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
        found = difference_of(y, p)
        assert found.error(found.best_scale(4), 4) <= found.error(0.0, 4)


def test_without_a_previous_output_the_coefficient_is_0() -> None:
    y, p = outputs(1)
    assert difference_of(y, None).best_scale(3) == 0.0
    assert difference_of(y, torch.zeros_like(p)).best_scale(3) == 0.0
    assert difference_of(y, None).error(0.0, 3) == pytest.approx(low_rank_error(y, 3))
