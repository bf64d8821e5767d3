"""ReLoRA's restart (arXiv 2307.05695) in plain PyTorch, which `engine/relora.py` is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_crnet.model.reference import CrossLayerLinear, ReferenceCRNet


def prune_by_magnitude(moment: Tensor, share: float) -> Tensor:
    """Zero `share` of the entries, the smallest."""
    return moment * (moment.abs() > moment.abs().flatten().quantile(share))


def prune_at_random(moment: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Zero each entry with the probability `share`."""
    return moment * (torch.rand(moment.shape, generator=generator) >= share)


@torch.no_grad()
def restart(
    model: ReferenceCRNet,
    optimizer: torch.optim.Optimizer,
    draw: Callable[[str, Tensor], Tensor],
    prune: Callable[[str, Tensor], Tensor],
) -> None:
    """Merge every A B into its W, begin with another A and B = 0, and zero a part of the moments of both.

    Args:
        optimizer: Adam or AdamW of PyTorch.
        draw: the new A, by the name of the weight, and the one until now.
        prune: what stays of a moment, by `KIND.WEIGHT`, and the moment.
    """
    for name, linear in model.named_modules():
        if not (isinstance(linear, CrossLayerLinear) and linear.method.has_frozen and not linear.is_full_rank):
            continue
        a, b = linear.a.weight, linear.b.weight
        linear.weight.add_(linear.scale * b @ a)
        a.copy_(draw(f"{name}.a.weight", a))
        b.zero_()
        for factor, parameter in (("a", a), ("b", b)):
            for kind in ("exp_avg", "exp_avg_sq"):
                moment = optimizer.state[parameter][kind]
                moment.copy_(prune(f"{kind}.{name}.{factor}.weight", moment))
