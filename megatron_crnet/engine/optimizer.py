"""The optimizer over parameter groups, and the learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from megatron_crnet.config.batch import BatchSizes
from megatron_crnet.config.experts_rules import spans_replicas
from megatron_crnet.config.optimizer_rules import restart_interval, wsd_decay_steps
from megatron_crnet.config.positions import position_table
from megatron_crnet.config.schema import Config, LrPart, OptimizerConfig
from megatron_crnet.engine.adam8bit import AdamW8bit
from megatron_crnet.engine.galore import Projection, is_projected
from megatron_crnet.engine.sharded_galore import ShardedGaLore
from megatron_crnet.model.reference import EMBEDDING, HEAD
from megatron_crnet.utils.errors import require

ParamGroup = dict[str, Any]


def is_partial(parameter: nn.Parameter) -> bool:
    """Whether each tensor-parallel rank holds only a part of the sum that is this parameter's gradient."""
    return bool(getattr(parameter, "sequence_parallel", False))


def lr_multiplier(name: str, multipliers: Mapping[LrPart, float]) -> float:
    """The factor of the learning rate of a canonical weight under `optimizer.lr_multipliers`."""
    parts: dict[LrPart, bool] = {
        "embedding": name.startswith("model.embed_"),
        "first_layer": name.startswith("model.layers.0.") and not name.endswith(("norm.weight", "norm.bias")),
        "a": name.endswith(".a.weight"),
        "b": name.endswith(".b.weight"),
        "beta": name.endswith(".beta"),
    }
    return math.prod(multipliers.get(part, 1.0) for part, applies in parts.items() if applies)


def count_groups(config: Config) -> int:
    """Groups of the parameters of a whole fp32 model."""
    model, section, spreads_experts = config.model, config.optimizer, spans_replicas(config.parallel)
    table, names = position_table(model), [EMBEDDING, HEAD, "model.norm.weight"]
    of_experts = table.architecture.experts.positions if table.architecture.experts is not None else ()
    prefixes = {p: "experts." if p in of_experts else "" for p in table.architecture.maps}
    for layer in range(model.num_layers):
        names += [
            f"model.layers.{layer}.{p.module}.beta" for p in table.architecture.positions if table.has_previous(layer)
        ]
        for p, prefix in prefixes.items():
            kinds = ["weight"] if table.is_full_rank(layer, p.name) else ["a.weight", "b.weight"]
            kinds += ["bias"] if table.architecture.has_biases else []
            names += [f"model.layers.{layer}.{prefix}{p.module}.{kind}" for kind in kinds]
        if table.architecture.experts is not None:
            names.append(f"model.layers.{layer}.{table.architecture.experts.router}.weight")
    undecayed = ("norm.weight", ".beta", ".bias")
    return len(
        {
            (
                name.endswith(undecayed),
                lr_multiplier(name, section.lr_multipliers),
                is_projected(name, section, table),
                spreads_experts and ".experts." in name,
            )
            for name in names
        }
    )


def parameter_groups(
    modules: Iterable[nn.Module],
    weight_decay: float,
    *,
    partial_apart: bool = False,
    multipliers: Mapping[nn.Parameter, float] | None = None,
    projected: Collection[nn.Parameter] = (),
    at_least: int = 0,
) -> list[ParamGroup]:
    """Groups by weight decay (matrices only, no beta, no norm), projection, learning rate, dtype and replicas.

    fp32 parameters of a bf16 model need groups of their own, because DeepSpeed flattens each group into one tensor.
    An fp32 model has the same number of groups on every pipeline stage, whatever its layers: DeepSpeed's ZeRO-1 sums
    the gradient norm over all stages with one call for each group, and another number elsewhere would hang.

    Args:
        multipliers: factors of the learning rate, if they are not 1.
        projected: what GaLore projects, in groups of its own.
        at_least: number of groups to which they are divided if they are fewer.
        partial_apart: also keep parameters with partial gradients in groups of their own, so that these can be
            summed where ZeRO 2 and 3 keep them, flattened by group. Stages then differ: not for pipelines.
    """
    groups: dict[tuple[bool, bool, bool, torch.dtype, float, bool], ParamGroup] = {}
    for parameter in (p for module in modules for p in module.parameters() if p.requires_grad):
        decays = parameter.dim() >= 2
        partial = partial_apart and is_partial(parameter)
        multiplier = (multipliers or {}).get(parameter, 1.0)
        group = groups.setdefault(
            (decays, parameter in projected, partial, parameter.dtype, multiplier, is_moe_param(parameter)),
            {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "wd_mult": 1.0 if decays else 0.0,
                "lr_mult": multiplier,
                "is_matrix": decays,
                "is_projected": parameter in projected,
                # what DeepSpeed asks of experts that are spread over replicas
                **({"moe": True, "name": getattr(parameter, "group_name", "")} if is_moe_param(parameter) else {}),
            },
        )
        group["params"].append(parameter)
    return _divided([groups[key] for key in sorted(groups, key=str)], at_least)


def _divided(groups: list[ParamGroup], at_least: int) -> list[ParamGroup]:
    """The groups, of which the largest give parameters to groups of the same settings until there are enough."""
    while len(groups) < at_least:
        largest = max(groups, key=lambda group: len(group["params"]))
        require(
            len(largest["params"]) > 1,
            f"optimizer.lr_multipliers needs {at_least} groups of parameters on every pipeline stage, but one has only "
            f"{len(groups)} parameters: use fewer stages or fewer multipliers",
        )
        groups.append({**largest, "params": [largest["params"].pop()]})
    return groups


def build_optimizer(
    groups: list[ParamGroup], config: OptimizerConfig, *, on_host: bool = False
) -> torch.optim.Optimizer:
    """What the name asks for; adamw is Apex's FusedAdam where it is installed, or PyTorch's, fused on CUDA.

    Args:
        on_host: DeepSpeed will give it master weights in host memory, which Apex's kernels cannot reach.
    """
    arguments: dict[str, Any] = {
        "lr": 0.0,  # the scheduler sets it; DeepSpeed steps once before, to allocate the moments
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw8bit":
        return AdamW8bit(groups, **arguments)
    if config.name == "galore":
        return ShardedGaLore(groups, Projection.of(config), **arguments)
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


class CosineRestarts(OptimizerParamScheduler):
    """ReLoRA's jagged cosine (arXiv 2307.05695): cosine, but each cycle from the second on begins at 0.

    Within w steps of such a cycle the rate rises linearly to that of the cosine w steps into the cycle.

    Args:
        interval: R, steps of a cycle.
        restart_warmup: w.
    """

    num_steps: int

    def __init__(self, *args: Any, interval: int, restart_warmup: int, **options: Any) -> None:
        self.interval, self.restart_warmup = interval, restart_warmup
        super().__init__(*args, lr_decay_style="cosine", **options)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """The rate of step `num_steps`, from 1."""
        cycle, before = divmod(self.num_steps - 1, self.interval)
        if cycle < 1 or before + 1 >= self.restart_warmup:
            return float(super().get_lr(param_group))
        now, self.num_steps = self.num_steps, cycle * self.interval + self.restart_warmup
        peak = float(super().get_lr(param_group))
        self.num_steps = now
        return peak * (before + 1) / self.restart_warmup


def build_scheduler(config: Config, optimizer: Any) -> OptimizerParamScheduler:
    """Megatron-Core's scheduler, already at step 1, so that the first update uses a rate above 0.

    It goes on by differences of `position`.

    Args:
        optimizer: anything with `param_groups`.
    """
    section, steps = config.optimizer, config.training.train_steps
    end = position(config, steps)
    for group in optimizer.param_groups:
        group["max_lr"] = section.lr * group.get("lr_mult", 1.0)
        group["min_lr"] = section.lr * section.min_lr_ratio * group.get("lr_mult", 1.0)
    options: dict[str, Any] = {"lr_decay_style": "WSD" if section.lr_decay_style == "wsd" else section.lr_decay_style}
    if section.lr_decay_style == "cosine_restarts":
        options = {"interval": restart_interval(config), "restart_warmup": section.lr_restart_warmup_steps}
    scheduler = (CosineRestarts if "interval" in options else OptimizerParamScheduler)(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.lr * section.min_lr_ratio,
        lr_warmup_steps=position(config, section.lr_warmup_steps),
        lr_decay_steps=end,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=end,
        wd_incr_style="constant",
        wsd_decay_steps=end - position(config, max(steps - wsd_decay_steps(section, steps), 0)),
        lr_wsd_decay_style=section.lr_wsd_decay_style,
        **options,
    )
    scheduler.step(position(config, 1))
    return scheduler
