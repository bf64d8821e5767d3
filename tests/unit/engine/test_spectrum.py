from __future__ import annotations

import pytest
import torch

from megatron_crnet.config.positions import position_table
from megatron_crnet.engine.spectrum import crosses, energies, leading_values
from tests.helpers import tiny_config


@pytest.mark.parametrize("held", [6, 4])  # of rank 4 the Gram matrices are singular
def test_energies_are_the_squared_singular_values_of_the_whole_product(held: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(held, 20, dtype=torch.float64), torch.randn(12, held, dtype=torch.float64)
    a, b = torch.cat([a, a[: 6 - held]]), torch.cat([b, torch.zeros(12, 6 - held, dtype=torch.float64)], 1)
    found = energies(a @ a.t(), b.t() @ b)
    torch.testing.assert_close(found, torch.linalg.svdvals(b @ a)[:6].square(), rtol=1e-10, atol=1e-10)
    assert (found >= 0).all()


@pytest.mark.parametrize(("before", "after", "count"), [(8, 5, 5), (8, 9, 4), (7, 32, 4), (1, 2, 1), (8, 8, 0)])
def test_leading_values_are_those_of_a_smaller_rank_or_of_half_of_one_that_grows(
    before: int, after: int, count: int
) -> None:
    table, following = (position_table(tiny_config({"rank": rank}).model) for rank in (before, after))
    assert leading_values("model.layers.3.mlp.up_proj.b.weight", table, following) == count
    assert leading_values("model.layers.0.mlp.up_proj.b.weight", table, following) == 0, "a full-rank layer"


def test_ranks_grow_at_a_small_share_and_shrink_at_a_large_one() -> None:
    assert [crosses(share, 0.9, grows=True) for share in (0.89, 0.9, 0.91)] == [True, True, False]
    assert [crosses(share, 0.9, grows=False) for share in (0.89, 0.9, 0.91)] == [False, True, True]
