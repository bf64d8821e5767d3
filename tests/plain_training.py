"""The optimizers that layouts are compared with, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_crnet.config.schema import Config
from megatron_crnet.engine.galore import GaLore, Projection
from megatron_crnet.model.reference import ReferenceCRNet
from megatron_crnet.model.reference_relora import prune_at_random, prune_by_magnitude, restart
from megatron_crnet.model.weights import canonical_generator, initial_value


def restart_reference(
    reference: ReferenceCRNet, optimizer: torch.optim.Optimizer, config: Config, transformer: Any, number: int
) -> None:
    """Restart `number` as `config.relora` asks for it, with the numbers that every layout draws."""
    section, seed = config.relora, config.training.seed

    def prune(name: str, moment: Tensor) -> Tensor:
        if section.prune == "reset":
            return torch.zeros_like(moment)
        if section.prune == "magnitude":
            return prune_by_magnitude(moment, section.prune_share)
        return prune_at_random(moment, section.prune_share, canonical_generator(f"{name}@{number}", seed))

    def draw(name: str, a: Tensor) -> Tensor:
        return initial_value(name, tuple(a.shape), transformer, seed, number)

    restart(reference, optimizer, draw, prune)


def plain_optimizer(named: dict[str, Tensor], config: Config) -> torch.optim.Optimizer:
    """AdamW, or the plain GaLore, whose groups say what is projected: all linear maps of layers, but no router."""
    section = config.optimizer
    options: dict[str, Any] = {"betas": (section.adam_beta1, section.adam_beta2), "eps": section.adam_eps}
    groups = [
        {
            "params": [parameter],
            "weight_decay": section.weight_decay if parameter.dim() >= 2 else 0.0,
            "lr_mult": _plain_multiplier(name, {**section.lr_multipliers}),
            "is_projected": name.startswith("model.layers.") and parameter.dim() == 2 and ".mlp.gate." not in name,
        }
        for name, parameter in named.items()
    ]
    if section.name == "galore":
        return GaLore(groups, Projection.of(section), lr=0.0, **options)
    return torch.optim.AdamW(groups, **options)


def _plain_multiplier(name: str, multipliers: dict[str, float]) -> float:
    words, factor = name.split("."), 1.0
    if "embed_tokens" in words or "embed_positions" in words:
        factor *= multipliers.get("embedding", 1.0)
    if words[:3] == ["model", "layers", "0"] and "norm" not in name:
        factor *= multipliers.get("first_layer", 1.0)
    for part in ("a", "b", "beta"):
        factor *= multipliers.get(part, 1.0) if part in words else 1.0
    return factor
