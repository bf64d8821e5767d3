from __future__ import annotations

import pytest
import torch

from megatron_crnet.engine.rank_change import reductions


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
