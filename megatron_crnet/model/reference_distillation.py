"""PELA's distillation losses in plain PyTorch, which `model/distillation.py` is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_crnet.model.reference import ReferenceCRNet


def features_and_logits(model: ReferenceCRNet, *inputs: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """The outputs of all blocks, [b, s, h], and the logits, [b, s, vocabulary]; `inputs` are `ReferenceCRNet`'s."""
    features: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, outputs: features.append(outputs[0]))
        for layer in model.model["layers"].children()
    ]
    logits = model(*inputs)
    for hook in hooks:
        hook.remove()
    return features, logits


def distillation_losses(
    student: tuple[list[Tensor], Tensor], teacher: tuple[list[Tensor], Tensor], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Feature loss and logit loss, as L_fm and L_sr in the authors' DeiT/engine.py, over the trained tokens.

    Args:
        student, teacher: what `features_and_logits` returns.
        mask: 1 for trained tokens, [b, s].
    """
    trained = mask.bool()
    (of_student, logits), (of_teacher, targets) = student, teacher
    terms = [F.mse_loss(x[trained], y[trained]) for x, y in zip(of_student, of_teacher, strict=True)]
    return torch.stack(terms).mean(), F.mse_loss(logits[trained], targets[trained])
