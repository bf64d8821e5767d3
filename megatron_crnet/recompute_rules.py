"""What must hold in `recompute` and in DeepSpeed's `activation_checkpointing`, which belong together."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from megatron_crnet.errors import require

if TYPE_CHECKING:
    from megatron_crnet.config import Config, RecomputeConfig

ACTIVATION_CHECKPOINTING_KEYS: dict[str, type] = {
    "partition_activations": bool,
    "cpu_checkpointing": bool,
    "contiguous_memory_optimization": bool,
    "number_checkpoints": int,
    "synchronize_checkpoint_boundary": bool,
    "profile": bool,
}
SECTION = "deepspeed.activation_checkpointing"


def check_recompute(config: Config) -> None:
    """Segment length, tolerance, what belongs to which strategy, and where kept tensors live."""
    _check_strategy(config.recompute)
    section = config.deepspeed.get("activation_checkpointing", {})
    require(
        isinstance(section, dict),
        f"{SECTION} is {section!r}, but must be a mapping: write activation_checkpointing: {{cpu_checkpointing: true}}",
    )
    _check_keys(section)
    _check_combinations(config, section)


def _check_strategy(recompute: RecomputeConfig) -> None:
    strategy = recompute.strategy
    require(
        recompute.inverse_tolerance is None or strategy == "inverse",
        f"recompute.inverse_tolerance {recompute.inverse_tolerance} is for strategy inverse, not {strategy}: "
        "leave it out",
    )
    require(
        not recompute.keep_attention_output or strategy in ("replay", "inverse"),
        f"recompute.keep_attention_output is for the strategies replay and inverse, not {strategy}: leave it out or "
        "use replay",
    )


def _check_keys(section: dict[str, Any]) -> None:
    for key, value in section.items():
        close = difflib.get_close_matches(key, ACTIVATION_CHECKPOINTING_KEYS, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(ACTIVATION_CHECKPOINTING_KEYS)}"
        require(key in ACTIVATION_CHECKPOINTING_KEYS, f"unknown key {SECTION}.{key}: {remedy}")
        kind = ACTIVATION_CHECKPOINTING_KEYS[key]
        wanted = "true or false" if kind is bool else "an integer"
        require(
            isinstance(value, kind) and (kind is bool or not isinstance(value, bool)),
            f"{SECTION}.{key} is {value!r}, but must be {wanted}: correct it",
        )


def _check_combinations(config: Config, section: dict[str, Any]) -> None:
    asked = [key for key, value in section.items() if value]
    strategy, contiguous = config.recompute.strategy, section.get("contiguous_memory_optimization", False)
    require(
        not asked or strategy != "none",
        f"{SECTION}.{asked[0] if asked else ''} is set, but recompute.strategy none keeps nothing there: set "
        "recompute.strategy replay, inverse or full, or leave the key out",
    )
    require(
        not contiguous or section.get("partition_activations", False),
        f"{SECTION}.contiguous_memory_optimization needs partition_activations in DeepSpeed: set both",
    )
    require(
        not contiguous or section.get("number_checkpoints", 0) > 0,
        f"{SECTION}.contiguous_memory_optimization needs number_checkpoints above 0, not "
        f"{section.get('number_checkpoints')}: give the number of segments of a pipeline stage",
    )
    require(
        contiguous or "number_checkpoints" not in section,
        f"{SECTION}.number_checkpoints {section.get('number_checkpoints')} is the size of the buffers of "
        "contiguous_memory_optimization, which is off: leave it out or switch that on",
    )
