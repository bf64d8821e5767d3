"""DeepSpeed's JSON: what the other sections decide and what the model asks for, then the `deepspeed` section."""

from __future__ import annotations

from typing import Any

from megatron_crnet.config.deepspeed_rules import reduce_bucket_size, zero_stage
from megatron_crnet.config.schema import Config


def is_plain(config: Config) -> bool:
    """Whether DeepSpeed runs the bare optimizer, without a wrapper that knows the gradient norm.

    Its own clipping is switched off then: it leaves out the parameters of all pipeline stages but the first.
    """
    return zero_stage(config) == 0 and not config.training.bf16


def deepspeed_config(config: Config, dp_size: int, elements: int) -> dict[str, Any]:
    """The JSON of a run on `dp_size` data-parallel ranks.

    Args:
        elements: parameters of this rank's part of the model, before ZeRO partitions it.
    """
    bf16, stage = config.training.bf16, zero_stage(config)
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
    if stage > 0:
        zero = config.deepspeed["zero_optimization"]
        settings["zero_optimization"] = {**zero, "reduce_bucket_size": reduce_bucket_size(config, elements)}
    return {**config.deepspeed, **settings}
