"""Small outputs of a map and of the same map in the layer before."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_crnet.analysis.difference import Difference


def outputs(seed: int, tokens: int = 120, width: int = 10) -> tuple[Tensor, Tensor]:
    """Y and P, [tokens, width]: P of falling energies, Y a multiple of it, of low rank beside, and noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = torch.logspace(0, -1.5, width, dtype=torch.float64)
    p = draw(tokens, width) * sizes
    coefficient = torch.rand((), generator=generator).item() * 2 - 0.5
    return coefficient * p + 0.3 * draw(tokens, 3) @ draw(3, width) + 0.1 * draw(tokens, width), p


def difference_of(y: Tensor, p: Tensor | None) -> Difference:
    if p is None:
        return Difference(y.T @ y, None, None, (float(y.square().sum()), 0.0, 0.0))
    norms = float(y.square().sum()), float((y * p).sum()), float(p.square().sum())
    return Difference(y.T @ y, y.T @ p, p.T @ p, norms)


def low_rank_error(matrix: Tensor, rank: int) -> float:
    """Squared, by an SVD of the whole matrix."""
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())
