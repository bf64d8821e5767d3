"""Fits s P + X A B to the outputs Y = X W of a dense map, from sums over tokens alone.

X [N, d] are the inputs of N tokens, W^T [m, d] the dense weight as it is stored, P [N, m] the outputs of the same map
in the previous layer. Wanted are s, A [d, r] and B [r, m] with the least

    || X W - s P - X A B ||_F.

P is not a linear function of X. Let C = X^T X = R^T R (Cholesky, R = L^T). The columns of X R^{-1} are orthonormal, so
that T = X W - s P falls into a part in the span of X, whose coordinates in these columns are

    Q(s) = R^{-T} X^T T = R W - s R^{-T} X^T P,    [d, m],

and one outside, -s (P's part outside), which no A B changes. X A B has the coordinates R A B, so

    || T - X A B ||^2 = (||T||^2 - ||Q(s)||^2) + || Q(s) - R A B ||^2 :

the best A B for this s is R^{-1} times the truncated SVD of Q(s) (Eckart and Young; the weighted SVD of the map
D(s) = C^{-1} X^T T = W - s C^{-1} X^T P, which least squares would give). The error is what `difference.py` minimises
over s, with Q_Y = R W, Q_P = R^{-T} X^T P and the norms ||Y||^2 = ||Q_Y||^2, <Y, P> = <Q_Y, Q_P>, ||P||^2. At full rank
s = 0 is best: X W itself can be had then. Only C, X^T P and ||P||^2 are sums over tokens.

Directions of X that the tokens hardly show would be left out of A B. C + lambda I stands for C, with lambda a share of
C's mean diagonal: as if sqrt(lambda) I were further rows of X, for which the dense map gives the targets and P is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_crnet.analysis.difference import SMALLEST, Difference

DAMPING = 0.01
"""Default of lambda, as a share of the mean of C's diagonal; GPTQ's (arXiv 2210.17323)."""


@dataclass(frozen=True)
class Fit:
    """A map s P + X A B.

    Attributes:
        a, b: the factors as weights of linear maps, [r, d] and [m, r], fp32.
        scale: s.
        error: ||Y - s P - X A B|| / ||Y|| on the tokens.
        plain_error: the same of the best X A B alone.
        norm: ||Y||^2.
    """

    a: Tensor
    b: Tensor
    scale: float
    error: float
    plain_error: float
    norm: float


def damped(covariance: Tensor, share: float) -> Tensor:
    """C + lambda I."""
    extra = share * covariance.diagonal().mean()
    return covariance + extra * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of a weight [m, d] itself, balanced: a [r, d] and b [m, r] (PELA, CVPR 2024)."""
    u, sizes, v = torch.linalg.svd(weight.float(), full_matrices=False)
    root = sizes[:rank].sqrt()
    return (root[:, None] * v[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def fit_map(
    weight: Tensor,
    covariance: Tensor,
    rank: int,
    cross: Tensor | None = None,
    previous_norm: float = 0.0,
    least_scale: float = 0.0,
) -> Fit:
    """The best s, A and B.

    Args:
        weight: W^T, [m, d].
        covariance: C, [d, d], fp64, positive definite (`damped`).
        cross: X^T P, [d, m], fp64; None where there is no P.
        previous_norm: ||P||^2.
        least_scale: |s| cannot be below; in place of such an s this one is taken.
    """
    lower = torch.linalg.cholesky(covariance)
    q_y = lower.T @ weight.to(covariance).T
    q_p = None if cross is None else torch.linalg.solve_triangular(lower, cross, upper=False)
    is_wide = q_y.shape[1] > q_y.shape[0]
    difference = _difference(q_y, q_p, previous_norm, is_wide)
    scale = difference.best_scale(rank)
    if q_p is not None and abs(scale) < least_scale:
        scale = least_scale
    error, basis = difference.solve(scale, rank)
    q = q_y if q_p is None else q_y - scale * q_p
    # q's part in the span of its first singular vectors, on the side where they are shorter
    left, right = (basis, basis.T @ q) if is_wide else (q @ basis, basis.T)
    a, b = _balanced(torch.linalg.solve_triangular(lower.T, left, upper=True), right)
    plain_error = error if scale == 0 else difference.error(0.0, rank)
    whole = max(difference.norms[0], SMALLEST)
    error, plain_error = ((value / whole) ** 0.5 for value in (error, plain_error))
    return Fit(a.T.float().contiguous(), b.T.float().contiguous(), scale, error, plain_error, difference.norms[0])


def _difference(q_y: Tensor, q_p: Tensor | None, previous_norm: float, is_wide: bool) -> Difference:
    def product(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.T if is_wide else a.T @ b

    yy = product(q_y, q_y)
    if q_p is None:
        return Difference(yy, None, None, (float(yy.trace()), 0.0, 0.0))
    norms = float(yy.trace()), float((q_y * q_p).sum()), previous_norm
    return Difference(yy, product(q_y, q_p), product(q_p, q_p), norms)


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product with A^T A = B B^T, as those of an SVD whose singular values are shared out."""
    q_a, r_a = torch.linalg.qr(a)
    q_b, r_b = torch.linalg.qr(b.T)
    u, sizes, v = torch.linalg.svd(r_a @ r_b.T)
    root = sizes.sqrt()
    return q_a @ (u * root), (root[:, None] * v) @ q_b.T
