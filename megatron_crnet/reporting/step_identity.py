"""Identifies the step that figures are of: a fingerprint of everything that decides it, and a readable line.

Estimates, simulations and benchmarks of the same step have the same fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from megatron_crnet.config.architectures import ARCHITECTURES
from megatron_crnet.config.deepspeed import zero_stage
from megatron_crnet.config.loading import resolved
from megatron_crnet.config.model_size import total_parameters
from megatron_crnet.config.schema import Config

SECTIONS = ("model", "parallel", "recompute", "deepspeed")
FIELDS = {
    "training": ("micro_batch_size", "global_batch_size", "seq_length", "dtype", "cross_layer_fusion"),
    "optimizer": ("clip_grad",),
}
"""Of the other sections. Of AdamW only what adds a norm: all else of it is numbers."""
OF_OPTIMIZER = ("name", "galore_rank", "update_proj_gap", "proj_type", "rotate_moments")
"""Of the other optimizers, whose states are of other sizes."""
UNUSED = ("distributed_timeout_minutes",)
"""Fields that no step depends on."""


def identify_step(config: Config, world_size: int) -> dict[str, str]:
    """`fingerprint` and `line` of the step that `config` makes on `world_size` ranks, as files of figures hold them."""
    values = resolved(config)
    zero = {**config.deepspeed.get("zero_optimization", {}), "stage": zero_stage(config)}
    values["deepspeed"] = {**config.deepspeed, "zero_optimization": zero}
    facts: dict[str, Any] = {name: {k: v for k, v in values[name].items() if k not in UNUSED} for name in SECTIONS}
    if ARCHITECTURES[config.model.architecture].is_rotary:
        del facts["model"]["max_position_embeddings"]  # nothing is learned of them
    if config.parallel.expert_model_parallel_size == 1:
        del facts["parallel"]["moe_token_dispatcher_type"]  # nothing is sent
    facts |= {name: {key: values[name][key] for key in fields} for name, fields in FIELDS.items()}
    if config.optimizer.name != "adamw":
        facts["optimizer"] |= {k: v for k, v in values["optimizer"].items() if k in OF_OPTIMIZER}
    if config.distillation.teacher is not None:
        facts["distillation"] = {**values["distillation"], "teacher": True}
    if config.rank_schedule.ranks:
        facts["rank_schedule"] = values["rank_schedule"]
    text = json.dumps(_plain({**facts, "world_size": world_size}), sort_keys=True)
    return {"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:12], "line": _line(config, world_size)}


def _plain(value: Any) -> Any:
    """Equal numbers written alike: 1e6 as 1000000."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _line(config: Config, world_size: int) -> str:
    model, training, parallel = config.model, config.training, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size or 1
    ep, dispatcher = parallel.expert_model_parallel_size, parallel.moe_token_dispatcher_type
    return (
        f"{model.variant} of {total_parameters(model) / 1e6:,.2f}M parameters, {training.global_batch_size} x "
        f"{training.seq_length} tokens per step in micro-batches of {training.micro_batch_size}, {training.dtype}, "
        f"recomputation {config.recompute.strategy}, "
        f"{world_size} rank{'s' * (world_size != 1)}: TP {tp} x PP {pp}{f' x VPP {vpp}' if vpp > 1 else ''} x "
        f"DP {world_size // (tp * pp)}{f', EP {ep} by {dispatcher}' if ep > 1 else ''}, ZeRO-{zero_stage(config)}"
    )
