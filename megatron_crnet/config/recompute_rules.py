"""What must hold in `recompute` and in DeepSpeed's `activation_checkpointing`, which belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_crnet.utils.errors import require

if TYPE_CHECKING:
    from megatron_crnet.config.schema import Config, RecomputeConfig

SECTION = "deepspeed.activation_checkpointing"


def check_recompute(config: Config) -> None:
    """Segment length, tolerance, what belongs to which strategy, and where kept tensors live."""
    _check_strategy(config.recompute)
    _check_combinations(config, config.deepspeed.get("activation_checkpointing", {}))


def _check_strategy(recompute: RecomputeConfig) -> None:
    strategy, traits = recompute.strategy, recompute.traits
    require(
        recompute.inverse_tolerance is None or traits.inverts,
        f"recompute.inverse_tolerance {recompute.inverse_tolerance} is for strategy inverse, not {strategy}: "
        "leave it out",
    )
    require(
        not recompute.keep_attention_output or traits.saves_z,
        f"recompute.keep_attention_output is for the strategies replay and inverse, not {strategy}: leave it out or "
        "use replay",
    )


def _check_combinations(config: Config, section: dict[str, Any]) -> None:
    asked = [key for key, value in section.items() if value]
    contiguous = section.get("contiguous_memory_optimization", False)
    require(
        not asked or config.recompute.traits.recomputes,
        f"{SECTION}.{asked[0] if asked else ''} is set, but recompute.strategy {config.recompute.strategy} keeps "
        "nothing there: set recompute.strategy replay, inverse or full, or leave the key out",
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
        not (contiguous and config.recompute.keep_attention_output and config.data.reset_attention_mask),
        f"{SECTION}.contiguous_memory_optimization with recompute.keep_attention_output would need buffers for every "
        "length that a document can have under data.reset_attention_mask: leave one of the three out",
    )
    require(
        contiguous or "number_checkpoints" not in section,
        f"{SECTION}.number_checkpoints {section.get('number_checkpoints')} is the size of the buffers of "
        "contiguous_memory_optimization, which is off: leave it out or switch that on",
    )
