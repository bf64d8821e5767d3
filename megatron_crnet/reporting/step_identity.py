"""Which step figures are of: a fingerprint of everything that decides it, and a line for people.

Figures with one fingerprint are of one and the same step, whoever found them: formulas, a simulated rank, a benchmark.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from megatron_crnet.config.deepspeed_rules import zero_stage
from megatron_crnet.config.loading import resolved
from megatron_crnet.config.model_size import total_parameters
from megatron_crnet.config.schema import Config

DECIDES: dict[str, tuple[str, ...] | None] = {
    "model": None,
    "training": ("micro_batch_size", "global_batch_size", "seq_length", "dtype", "cross_layer_fusion"),
    "optimizer": ("clip_grad",),
    "parallel": None,
    "recompute": None,
}
"""Fields by section; None means all of them. Of the optimizer only what adds a norm: all else of it is numbers."""

LEAVES_AS_IT_IS = ("max_position_embeddings", "distributed_timeout_minutes")
"""Fields of these sections that no step depends on."""


def identify_step(config: Config, world_size: int) -> dict[str, str]:
    """`fingerprint` and `line` of the step that `config` makes on `world_size` ranks, as files of figures hold them."""
    facts = json.dumps(_facts(config, world_size), sort_keys=True)
    return {"fingerprint": hashlib.sha256(facts.encode()).hexdigest()[:12], "line": _line(config, world_size)}


def _facts(config: Config, world_size: int) -> Any:
    values = resolved(config)
    chosen: dict[str, Any] = {
        section: {
            name: value
            for name, value in values[section].items()
            if (fields is None or name in fields) and name not in LEAVES_AS_IT_IS
        }
        for section, fields in DECIDES.items()
    }
    zero = {**config.deepspeed.get("zero_optimization", {}), "stage": zero_stage(config)}
    chosen["deepspeed"] = {**config.deepspeed, "zero_optimization": zero}
    return _plain({**chosen, "world_size": world_size})


def _plain(value: Any) -> Any:
    """Equal numbers written alike, 1e6 as 1000000, and keys as JSON has them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _line(config: Config, world_size: int) -> str:
    model, training, parallel = config.model, config.training, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size or 1
    interleaved = f" x VPP {vpp}" if vpp > 1 else ""
    recompute = config.recompute.strategy
    return (
        f"{model.variant} of {total_parameters(model) / 1e6:,.2f}M parameters, {training.global_batch_size} x "
        f"{training.seq_length} tokens a step in micro-batches of {training.micro_batch_size}, {training.dtype}, "
        f"{'no recomputation' if recompute == 'none' else f'recomputation by {recompute}'}, "
        f"{world_size} {'rank' if world_size == 1 else 'ranks'}: TP {tp} x PP {pp}{interleaved} x "
        f"DP {world_size // (tp * pp)}, ZeRO-{zero_stage(config)}"
    )
