"""DeepSpeed's JSON: what the other sections decide, then the `deepspeed` section as it stands, checked.

DeepSpeed itself ignores keys that it does not know, so a misspelt one would change nothing and say nothing.
"""

from __future__ import annotations

import difflib
from typing import Any

from megatron_crnet.config import Config
from megatron_crnet.deepspeed_rules import zero_stage
from megatron_crnet.errors import ConfigError

KNOWN_KEYS = (
    "activation_checkpointing",
    "aio",
    "checkpoint",
    "comms_logger",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "timers",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)


def is_plain(config: Config) -> bool:
    """Whether DeepSpeed runs the bare optimizer, without a wrapper that knows the gradient norm.

    Its own clipping is switched off then: it leaves out the parameters of all pipeline stages but the first.
    """
    return zero_stage(config) == 0 and config.training.dtype == "fp32"


def deepspeed_config(config: Config, dp_size: int) -> dict[str, Any]:
    """The JSON of a run on `dp_size` data-parallel ranks."""
    bf16, stage = config.training.dtype == "bf16", zero_stage(config)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "train_batch_size": config.training.micro_batch_size * dp_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if is_plain(config) else config.optimizer.clip_grad,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    if bf16 and stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        # DeepSpeed's default would round the fp32 sums to bf16 before they are added up over replicas
        settings["communication_data_type"] = "fp32"
    if bf16 and stage == 1:
        # every backward pass adds to the fp32 gradients at once, whoever started it
        settings["bf16"]["immediate_grad_update"] = True
    return {**settings, **config.deepspeed}


def check_deepspeed_keys(config: Config) -> None:
    """Refuse keys that DeepSpeed would ignore, and values of zero_optimization that it would stumble over.

    Raises:
        ConfigError: names the key and the nearest one that exists.
    """
    for key in config.deepspeed:
        if key not in KNOWN_KEYS:
            close = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(KNOWN_KEYS)}"
            raise ConfigError(f"unknown key deepspeed.{key}: {remedy}")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    section = config.deepspeed.get("zero_optimization", {})
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        close = difflib.get_close_matches(key, DeepSpeedZeroConfig.model_fields, n=1)
        remedy = f"did you mean {close[0]}?" if close and close[0] != key else "correct it"
        value = first.get("input")
        raise ConfigError(f"deepspeed.zero_optimization.{key} is {value!r}: {first['msg']}: {remedy}") from error
