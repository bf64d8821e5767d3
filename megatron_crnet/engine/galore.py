"""GaLore (Zhao et al., 2024, arXiv:2403.03507) in plain PyTorch: Adam in a subspace of the gradient of each matrix.

For a matrix W [m, n] with gradient G, every T = `update_proj_gap` updates, from the gradient of that update, in fp32:

    U S V^T = svd(G)             L = U[:, :r]  or  1             R = V[:, :r]^T  or  1

and at every update t from 1, with g = L^T G R^T:

    M <- b1 M + (1 - b1) g       V <- b2 V + (1 - b2) g²
    W <- W - lr scale sqrt(1 - b2^t) / (1 - b1^t)  L (M / (sqrt(V) + eps)) R
    W <- (1 - lr decay) W

`proj_type` says on which sides there is a projection; std projects the longer side's inner dimension, so that it keeps
2 r max(m, n) elements of moments and r min(m, n) of a projection instead of 2 m n.

As in the original, M and V stay as they are when the projections change, though their coordinates are then others.
With `rotate_moments` they follow, C = L_new^T L_old and D = R_old R_new^T: M <- C M D, and V <- C² V D² (squares of
elements), which is the second moment of the new coordinates if the old ones are uncorrelated.

`GaLore` updates whole matrices in one process: every layout of `engine/sharded_galore.py`, which uses the same
`Subspace` on gradients that it has gathered, is compared with it. docs/decisions/galore.md has the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_crnet.config.positions import PositionTable
from megatron_crnet.config.schema import OptimizerConfig
from megatron_crnet.engine.adam import ParamGroup, PerParameterOptimizer
from megatron_crnet.engine.state_kinds import KINDS, LEFT, MASTER, MOMENTS, RIGHT


@dataclass(frozen=True)
class Projection:
    """How matrices are projected; the fields of `OptimizerConfig` under the same names."""

    galore_rank: int = 128
    update_proj_gap: int = 200
    galore_scale: float = 0.25
    proj_type: str = "std"
    rotate_moments: bool = False

    @classmethod
    def of(cls, section: OptimizerConfig) -> Projection:
        """That of a configuration."""
        return cls(**{name: getattr(section, name) for name in cls.__dataclass_fields__})

    def sides(self, shape: tuple[int, int]) -> tuple[bool, bool]:
        """Whether a matrix [m, n] is projected from the left (to r rows) and from the right (to r columns)."""
        tall = shape[0] >= shape[1]
        return {
            "std": (not tall, tall),
            "reverse_std": (tall, not tall),
            "left": (True, False),
            "right": (False, True),
            "full": (True, True),
        }[self.proj_type]

    def state_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """Shapes of what is kept for a matrix [m, n], by kind."""
        (m, n), r, (left, right) = shape, self.galore_rank, self.sides(shape)
        moments = dict.fromkeys(MOMENTS, (r if left else m, r if right else n))
        return moments | ({LEFT: (m, r)} if left else {}) | ({RIGHT: (r, n)} if right else {})


def is_projected(name: str, section: OptimizerConfig, table: PositionTable) -> bool:
    """Whether GaLore projects a canonical weight: a linear map of a layer."""
    return section.name == "galore" and table.position_of(name) != ""


def kept_shapes(
    name: str, shape: tuple[int, ...], section: OptimizerConfig, table: PositionTable
) -> dict[str, tuple[int, ...]]:
    """Shapes of what a checkpoint holds of a canonical weight, by kind."""
    if is_projected(name, section, table):
        return {MASTER: shape, **Projection.of(section).state_shapes((shape[0], shape[1]))}
    return dict.fromkeys(KINDS, shape)


class Subspace:
    """The state of one matrix [m, n].

    Args:
        share: is told of each new projection, which it may change in place.

    Attributes:
        tensors: by kind (`Projection.state_shapes`); empty before the first update.
    """

    def __init__(self, projection: Projection, share: Callable[[Tensor], None] = lambda _: None) -> None:
        self.projection, self._share = projection, share
        self.tensors: dict[str, Tensor] = {}

    def direction(self, gradient: Tensor, step: int, betas: tuple[float, float], eps: float) -> Tensor:
        """What the learning rate multiplies, [m, n], from the gradient of update `step` (from 1)."""
        if not self.tensors or (step - 1) % self.projection.update_proj_gap == 0:
            self._project_anew(gradient)
        low, (first, second) = self._project(gradient), (self.tensors[kind] for kind in MOMENTS)
        first.lerp_(low, 1 - betas[0])
        second.mul_(betas[1]).addcmul_(low, low, value=1 - betas[1])
        found = self._back(first / second.sqrt().add_(eps))
        return found.mul_(self.projection.galore_scale * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step))

    def _project_anew(self, gradient: Tensor) -> None:
        """Take the projections of this gradient; moments start at zero, or follow where they shall."""
        r, before = self.projection.galore_rank, dict(self.tensors)
        left, right = self.projection.sides((gradient.shape[0], gradient.shape[1]))
        u, vt = singular_vectors(gradient)
        # copies, because a view would keep all singular vectors; contiguous, as a checkpoint gives them back
        copied: dict[str, Any] = {"dtype": gradient.dtype, "copy": True, "memory_format": torch.contiguous_format}
        if left:
            self.tensors[LEFT] = u[:, :r].to(**copied)
        if right:
            self.tensors[RIGHT] = vt[:r].to(**copied)
        for kind in sorted(self.tensors.keys() & {LEFT, RIGHT}):  # collective calls in one order
            self._share(self.tensors[kind])
        if not before:
            low = self._project(gradient)
            self.tensors.update({kind: torch.zeros_like(low) for kind in MOMENTS})
        elif self.projection.rotate_moments:
            self._rotate(before)

    def _rotate(self, before: Mapping[str, Tensor]) -> None:
        for kind in MOMENTS:
            turned = self.tensors[kind]
            if LEFT in before:
                c = self.tensors[LEFT].mT @ before[LEFT]
                turned = (c if kind == MOMENTS[0] else c.square()) @ turned
            if RIGHT in before:
                d = before[RIGHT] @ self.tensors[RIGHT].mT
                turned = turned @ (d if kind == MOMENTS[0] else d.square())
            self.tensors[kind] = turned

    def _project(self, gradient: Tensor) -> Tensor:
        if LEFT in self.tensors:
            gradient = self.tensors[LEFT].mT @ gradient
        return gradient @ self.tensors[RIGHT].mT if RIGHT in self.tensors else gradient

    def _back(self, low: Tensor) -> Tensor:
        if LEFT in self.tensors:
            low = self.tensors[LEFT] @ low
        return low @ self.tensors[RIGHT] if RIGHT in self.tensors else low


def singular_vectors(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """U [m, k] and V^T [k, n] of a finite matrix, k = min(m, n), in fp32."""
    try:
        u, _, vt = torch.linalg.svd(gradient.float(), full_matrices=False)
    except torch.linalg.LinAlgError:  # it did not converge, as may happen where singular values repeat
        u, _, vt = torch.linalg.svd(gradient.double().cpu(), full_matrices=False)
    return u.to(gradient.device, torch.float32), vt.to(gradient.device, torch.float32)


class GaLore(PerParameterOptimizer):
    """GaLore on whole matrices in groups with `is_projected`, AdamW on everything in the others.

    Args:
        groups: parameters; gradients and state have their dtype.
        options: lr, betas, eps and weight_decay.
    """

    def __init__(self, groups: list[ParamGroup], projection: Projection, **options: Any) -> None:
        super().__init__(groups, options)
        self.projection = projection

    def update(self, parameter: Tensor, gradient: Tensor, group: ParamGroup) -> None:
        """See the base."""
        if not group["is_projected"]:
            self.update_by_adamw(parameter, gradient, group)
            return
        state: dict[str, Any] = self.state[parameter]
        if "subspace" not in state:
            state.update(step=0, subspace=Subspace(self.projection))
        state["step"] += 1
        apply(parameter, state["subspace"].direction(gradient, state["step"], group["betas"], group["eps"]), group)


def apply(weights: Tensor, direction: Tensor, group: ParamGroup) -> None:
    """Move weights, or a part of them, against the direction, then let them decay."""
    weights.sub_(direction, alpha=group["lr"]).mul_(1 - group["lr"] * group["weight_decay"])
