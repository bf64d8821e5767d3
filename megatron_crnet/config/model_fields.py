"""Which fields of the `model` section say what a model computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_crnet.config.architectures import ARCHITECTURES
from megatron_crnet.config.positions import METHODS

OF_TRAINING = {
    *("beta_init", "init_method_std", "scale_residual_init", "hidden_dropout", "attention_dropout"),
    *("moe_aux_loss_coeff", "moe_z_loss_coeff"),
}
"""Those that say how it is trained, and nothing of what trained weights compute."""
OF_LOW_RANK = {"rank", "full_rank_layers", "full_rank_experts", "only_lr_act"}
OF_ROTARY = {"rotary_base", "rope_scaling_factor"}


def computing_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a `model` section without which what its trained weights compute is not known.

    Left out are those of training, of other variants and of other architectures.
    """
    method, is_rotary = METHODS[model["variant"]], ARCHITECTURES[model["architecture"]].is_rotary
    others = OF_TRAINING | ({"max_position_embeddings"} if is_rotary else OF_ROTARY)
    others |= OF_LOW_RANK if method.is_full_rank else set()
    others |= set() if method.is_chained else {"cross_layer_epsilon"}
    others |= set() if method.has_frozen else {"relora_scale"}
    return {name: value for name, value in model.items() if name not in others}
