"""The low-rank part of Y - s P: its energy, and the coefficient s that leaves the least.

Y are the outputs of a linear map on N tokens, P those of the same map in the previous layer, both [N, m]. Neither is
kept: what is asked follows from products of width k (m, or less) that are summed over tokens.

For one s let T = Y - s P. The best approximation of T of rank r has the error

    ||T||^2 - (sum of the r largest eigenvalues of G(s)),    G(s) = T^T T = Y^T Y - s (Y^T P + P^T Y) + s^2 P^T P

(Eckart and Young). Where only a part Q(s) of T can be reached, as by X A B, which lies in the columns of X, G(s) is
Q^T Q (or Q Q^T, whichever is smaller) and ||T||^2 stays whole: what lies outside is an error at every rank.

Over s as well: the error is the least over all U [k, r] with orthonormal columns of the parabola

    f_U(s) = ||Y - s P||^2 - tr(U^T G(s) U),

so that a better U for s and the best s for U (the bottom of a parabola) in turn never increase it. U becomes better by
products with G(s), as in subspace iteration: decompositions, which take longest, are needed for the starts alone. That
may end in a local minimum. It starts from the best of 0 (so that the result is never worse than the plain low-rank
approximation of Y) and the coefficients that are best at rank 0 and at full rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TURNS = 100
"""Most turns of the alternation."""
POWERS = 2
"""Products with G by which a turn improves U."""
TOLERANCE = 1e-6
"""Gain of a turn at which it ends, as a share of the error."""
SMALLEST = 1e-300
"""In place of ||Y||^2 where all outputs are 0."""


@dataclass(frozen=True)
class Difference:
    """Products of Y and P, or of their parts that can be reached, in fp64.

    Attributes:
        yy, yp, pp: Y^T Y, Y^T P and P^T P, [k, k]; yp and pp are None where there is no P.
        norms: ||Y||^2, <Y, P> and ||P||^2 of the whole outputs.
    """

    yy: Tensor
    yp: Tensor | None
    pp: Tensor | None
    norms: tuple[float, float, float]

    def gram(self, s: float) -> Tensor:
        """G(s), [k, k]."""
        if self.yp is None or self.pp is None or s == 0:
            return self.yy
        return self.yy - s * (self.yp + self.yp.T) + s * s * self.pp

    def total(self, s: float) -> float:
        """||Y - s P||^2."""
        yy, yp, pp = self.norms
        return max(yy - 2 * s * yp + s * s * pp, 0.0)

    def energies(self, s: float) -> Tensor:
        """Squared singular values, [k], the largest first."""
        return torch.linalg.eigvalsh(self.gram(s)).flip(0).clamp(min=0)

    def error(self, s: float, rank: int) -> float:
        """Squared error of rank `rank`."""
        return max(self.total(s) - float(self.energies(s)[:rank].sum()), 0.0)

    def solve(self, s: float, rank: int) -> tuple[float, Tensor]:
        """The same, and the eigenvectors of the largest eigenvalues of G(s), [k, rank]."""
        energies, vectors = torch.linalg.eigh(self.gram(s))
        first = max(len(energies) - rank, 0)
        return max(self.total(s) - float(energies[first:].clamp(min=0).sum()), 0.0), vectors[:, first:]

    def best_scale(self, rank: int) -> float:
        """The coefficient s with the least error of rank `rank`; 0 where there is no P."""
        if self.yp is None or self.pp is None or self.norms[2] <= 0:
            return 0.0
        s = min(self._starts(), key=lambda start: self.error(start, rank))
        least, basis = self.solve(s, rank)
        for _ in range(TURNS):
            s_next = self._bottom(basis)
            gram = self.gram(s_next)
            for _ in range(POWERS):
                basis = torch.linalg.qr(gram @ basis).Q
            found = self.total(s_next) - float(((gram @ basis) * basis).sum())
            if found >= least:
                break
            gain, s, least = least - found, s_next, found
            if gain <= TOLERANCE * least:
                break
        return s

    def _starts(self) -> set[float]:
        assert self.yp is not None
        whole = torch.eye(len(self.yy), dtype=self.yy.dtype, device=self.yy.device)
        return {0.0, self.norms[1] / self.norms[2], self._bottom(whole)}

    def _bottom(self, basis: Tensor) -> float:
        """The s at the bottom of f_U."""
        assert self.yp is not None
        assert self.pp is not None
        yp, pp = (
            norm - float(((product @ basis) * basis).sum())
            for norm, product in zip(self.norms[1:], (self.yp, self.pp), strict=True)
        )
        return yp / pp if pp > 1e-12 * self.norms[2] else 0.0
