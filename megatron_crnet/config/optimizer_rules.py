"""Rules on the optimizer and the learning-rate schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_crnet.config.positions import position_table
from megatron_crnet.utils.errors import require

if TYPE_CHECKING:
    from megatron_crnet.config.schema import Config, OptimizerConfig

SMALLEST_EPS_8BIT = 1e-10
"""Below it, what `engine/adam8bit.py` takes for 0 would change updates."""

READ_UNDER = {
    **dict.fromkeys(("galore_rank", "update_proj_gap", "galore_scale", "proj_type", "rotate_moments"), "galore"),
    **dict.fromkeys(("lr_restart_interval", "lr_restart_warmup_steps"), "cosine_restarts"),
    **dict.fromkeys(("lr_wsd_decay_steps", "lr_wsd_decay_style"), "wsd"),
}
"""Fields of the section that are read under one `name` or `lr_decay_style` alone."""


def remark_on_unread(optimizer: OptimizerConfig) -> str:
    """A remark on fields that have been set and that this optimizer does not read; empty if there are none."""
    chosen = {optimizer.name, optimizer.lr_decay_style}
    unread = [name for name in optimizer.changed() if name in READ_UNDER and READ_UNDER[name] not in chosen]
    if not unread:
        return ""
    others = sorted({READ_UNDER[name] for name in unread})
    fields = ", ".join(f"optimizer.{name}" for name in unread)
    return f"{fields} not read: {'that is' if len(unread) == 1 else 'these are'} for {' and '.join(others)}"


def check_optimizer(config: Config) -> None:
    """The schedule's parts fit the run."""
    optimizer, train_steps = config.optimizer, config.training.train_steps
    warmup = optimizer.lr_warmup_steps
    require(
        warmup < train_steps,
        f"optimizer.lr_warmup_steps {warmup} is not below training.train_steps {train_steps}: set the first to at most "
        f"{train_steps - 1} or the second to at least {warmup + 1}",
    )
    decay = wsd_decay_steps(optimizer, train_steps)
    require(
        optimizer.lr_decay_style != "wsd" or warmup + decay <= train_steps,
        f"optimizer.lr_warmup_steps {warmup} and lr_wsd_decay_steps {decay} are more than training.train_steps "
        f"{train_steps} together: lower one or train longer",
    )
    require(
        optimizer.name != "adamw8bit" or optimizer.adam_eps >= SMALLEST_EPS_8BIT,
        f"optimizer.adam_eps is {optimizer.adam_eps}, but adamw8bit takes gradients below 1e-12 for 0: use at least "
        f"{SMALLEST_EPS_8BIT}, or adamw",
    )
    if optimizer.name == "galore":
        _check_galore(config)


def _check_galore(config: Config) -> None:
    """There are full-rank maps to project, none of them smaller than the rank."""
    rank, model = config.optimizer.galore_rank, config.model
    require(
        model.variant == "full_rank",
        f"optimizer.name is galore, but the linear maps of model.variant {model.variant} are of low rank themselves: "
        "use variant full_rank, or adamw",
    )
    position, shape = min(position_table(model).shapes.items(), key=lambda item: min(item[1]))
    require(
        rank <= min(shape),
        f"optimizer.galore_rank {rank} is above {min(shape)}, the smaller side of the linear map {position}: use at "
        f"most {min(shape)}",
    )


def check_restarts(config: Config) -> None:
    """The cycles of the jagged cosine fill the run, and merges fall between them."""
    optimizer, merges, name = config.optimizer, config.relora.restart_interval, "optimizer.lr_restart_interval"
    if optimizer.lr_decay_style != "cosine_restarts":
        return
    require(
        config.training.rampup_batch_size is None,
        "optimizer.lr_decay_style cosine_restarts counts steps, but training.rampup_batch_size makes the schedule go "
        "by sequences: leave the ramp out, or use cosine",
    )
    require(
        bool(optimizer.lr_restart_interval or merges),
        f"optimizer.lr_decay_style is cosine_restarts, but neither {name} nor relora.restart_interval is set: set one",
    )
    interval, warm, whole = restart_interval(config), config.relora.warm_start_steps, config.training.train_steps
    shown = f"{name if optimizer.lr_restart_interval else 'relora.restart_interval'} {interval}"
    cycles, rest = divmod(whole - warm, interval)
    fewest = 2 if merges else 1  # a merge after the last step would be none
    fitting = " or ".join(str(warm + n * interval) for n in (cycles, cycles + 1) if n >= fewest) or warm + 2 * interval
    of_these = f", less relora.warm_start_steps {warm}" if warm else ""
    require(
        rest == 0,
        f"{shown} does not divide the {whole - warm} steps of the schedule (training.train_steps {whole}{of_these}): "
        f"use train_steps {fitting}, or another interval",
    )
    require(
        merges is None or merges % interval == 0,
        f"relora.restart_interval {merges} is not a multiple of {name} {interval}, so merges would not fall where the "
        "rate drops: use the same number for both",
    )
    for field, value in (
        ("lr_warmup_steps", optimizer.lr_warmup_steps),
        ("lr_restart_warmup_steps", optimizer.lr_restart_warmup_steps),
    ):
        require(value <= interval, f"optimizer.{field} {value} is above {shown}: lower it")


def restart_interval(config: Config) -> int:
    """Steps of a cycle of cosine_restarts, the default filled in."""
    found = config.optimizer.lr_restart_interval or config.relora.restart_interval
    assert found is not None  # checked
    return found


def wsd_decay_steps(optimizer: OptimizerConfig, train_steps: int) -> int:
    """Steps of wsd's final decay, the default filled in."""
    return optimizer.lr_wsd_decay_steps or max(1, train_steps // 10)
