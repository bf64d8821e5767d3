"""AdamW over parameter groups, and the learning rate over time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from megatron_crnet.config.batch import BatchSizes
from megatron_crnet.config.schema import Config, OptimizerConfig
from megatron_crnet.config.validation import wsd_decay_steps

ParamGroup = dict[str, Any]


def is_partial(parameter: nn.Parameter) -> bool:
    """Whether each tensor-parallel rank holds only a part of the sum that is this parameter's gradient."""
    return bool(getattr(parameter, "sequence_parallel", False))


def parameter_groups(
    modules: Iterable[nn.Module], weight_decay: float, *, partial_apart: bool = False
) -> list[ParamGroup]:
    """Groups by weight decay (matrices only: none for beta and norms) and dtype.

    fp32 parameters of a bf16 model need groups of their own, because DeepSpeed flattens each group into one tensor.
    An fp32 model has the same two groups on every pipeline stage, whatever its layers: DeepSpeed's ZeRO-1 sums the
    gradient norm over all stages with one call for each group, and another number of groups elsewhere would hang.

    Args:
        partial_apart: also keep parameters with partial gradients in groups of their own, so that these can be
            summed where ZeRO 2 and 3 keep them, flattened by group. Stages then differ: not for pipelines.
    """
    groups: dict[tuple[bool, bool, torch.dtype], ParamGroup] = {}
    for parameter in (p for module in modules for p in module.parameters() if p.requires_grad):
        decays = parameter.dim() >= 2
        partial = partial_apart and is_partial(parameter)
        group = groups.setdefault(
            (decays, partial, parameter.dtype),
            {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "wd_mult": 1.0 if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=str)]


def build_adamw(groups: list[ParamGroup], config: OptimizerConfig, *, on_host: bool = False) -> torch.optim.Optimizer:
    """Apex's FusedAdam where it is installed, PyTorch's AdamW (fused on CUDA) otherwise.

    Args:
        on_host: DeepSpeed will give it master weights in host memory, which Apex's kernels cannot reach.
    """
    arguments: dict[str, Any] = {
        "lr": 0.0,  # the scheduler sets it; DeepSpeed steps once before, to allocate the moments
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
        "weight_decay": config.weight_decay,
    }
    if on_host or not torch.cuda.is_available():
        return torch.optim.AdamW(groups, **arguments)
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        return torch.optim.AdamW(groups, fused=True, **arguments)
    return FusedAdam(groups, adam_w_mode=True, **arguments)


def position(config: Config, steps: int) -> int:
    """Where `steps` steps lead on the learning rate's axis: steps, or sequences where the batch size has a ramp."""
    sizes = BatchSizes.of(config.training)
    return sizes.after(steps) if sizes.has_ramp else steps


def build_scheduler(config: Config, optimizer: Any) -> OptimizerParamScheduler:
    """Megatron-Core's scheduler, already at step 1, so that the first update uses a rate above 0.

    It goes on by differences of `position`.

    Args:
        optimizer: anything with `param_groups`.
    """
    section, steps = config.optimizer, config.training.train_steps
    end = position(config, steps)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.lr * section.min_lr_ratio,
        lr_warmup_steps=position(config, section.lr_warmup_steps),
        lr_decay_steps=end,
        lr_decay_style="WSD" if section.lr_decay_style == "wsd" else section.lr_decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=end,
        wd_incr_style="constant",
        wsd_decay_steps=end - position(config, max(steps - wsd_decay_steps(section, steps), 0)),
        lr_wsd_decay_style=section.lr_wsd_decay_style,
    )
    scheduler.step(position(config, 1))
    return scheduler
