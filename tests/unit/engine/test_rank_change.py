from __future__ import annotations

import pytest
import torch

from megatron_crnet.engine.rank_change import reductions, shrink
from megatron_crnet.engine.state_kinds import KINDS, MASTER


@pytest.mark.parametrize("held", [6, 4])  # of rank 4 the Gram matrices are singular
def test_reduced_factors_are_the_best_approximation_of_their_product(held: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(held, 20, dtype=torch.float64), torch.randn(12, held, dtype=torch.float64)
    a, b = torch.cat([a, a[: 6 - held]]), torch.cat([b, torch.zeros(12, 6 - held, dtype=torch.float64)], 1)
    p, q = reductions(a @ a.t(), b.t() @ b, 3)
    u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
    torch.testing.assert_close(b @ q @ p @ a, u[:, :3] * s[:3] @ v[:3])
    torch.testing.assert_close((p @ a).norm(dim=1), s[:3].sqrt())
    torch.testing.assert_close((b @ q).norm(dim=0), s[:3].sqrt())


def test_rows_beyond_the_rank_of_the_product_are_drawn_so_that_some_factor_gets_a_gradient() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(8, 20), torch.cat([torch.randn(12, 4), torch.zeros(12, 4)], 1)
    of_a, of_b = ({kind: x.clone() for kind in KINDS} for x in (a, b))
    drawn = torch.randn(6, 20)
    p, q = reductions(a.double() @ a.double().t(), b.double().t() @ b.double(), 6)
    shrink(of_a, of_b, p, q, lambda: drawn)
    torch.testing.assert_close(of_b[MASTER] @ of_a[MASTER], b @ a)
    assert torch.equal(of_a[MASTER][4:], drawn[4:])
    for kind in KINDS:
        assert torch.equal(of_b[kind][:, 4:], torch.zeros(12, 2))
    assert not of_a["exp_avg"][4:].any()
