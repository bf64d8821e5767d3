"""A configuration as one of another variant, for what is compared or counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_crnet.config.schema import OF_VARIANT, Config, OptimizerConfig, Variant

OF_METHOD = ("relora", "rank_schedule", "distillation")
"""Sections that belong to the method of a run, and may not fit another variant."""


def as_variant(config: Config, variant: Variant, **changes: Any) -> Config:
    """The sizes and layout of `config` for another variant, under AdamW, without what belongs to its own method.

    Args:
        changes: further fields of the model.

    Raises:
        ConfigError: the variant cannot have these sizes.
    """
    sections = {name: type(getattr(config, name))() for name in OF_METHOD}
    return replace(
        config,
        model=replace(config.model, **{"variant": variant, **OF_VARIANT, **changes}),
        optimizer=OptimizerConfig(lr_warmup_steps=0),
        training=replace(config.training, cuda_graphs=None),
        **sections,
    )


def on_one_process(config: Config) -> Config:
    """The same model and micro-batch in one process, without parallelism and ZeRO."""
    training = replace(config.training, cuda_graphs=None)
    return replace(config, training=training, parallel=type(config.parallel)(), deepspeed={})
