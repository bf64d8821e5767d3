"""Traffic of a configuration, counted in real runs of its layers on the ranks at hand.

Widths, ranks and layout are the configuration's; layers, vocabulary and tokens are cut down, because what one more
layer sends for one token does not depend on them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_crnet.config.megatron import build_transformer_config
from megatron_crnet.config.positions import POSITIONS, chain_starts, model_ranks
from megatron_crnet.config.schema import Config, ModelConfig
from megatron_crnet.distributed.process_groups import initialize_parallel
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.planning.communication import CommunicationCounter, Traffic

TENSOR_PARALLEL_KINDS = ("all_gather", "reduce_scatter", "all_reduce")


@dataclass(frozen=True)
class LayerTraffic:
    """Tensor-parallel volume of one layer for one token, in elements and in bytes (see `planning/communication.py`).

    Attributes:
        forward: of the forward pass.
        step: of forward and backward pass.
        gradients: once a step whatever the tokens, for gradients of replicated parameters.
    """

    forward: float
    step: float
    gradients: float
    forward_bytes: float
    step_bytes: float
    gradients_bytes: float


@dataclass(frozen=True)
class BoundaryTraffic:
    """What a pipeline rank sends forward for one token of this tensor-parallel rank."""

    elements: float
    bytes: float


def layer_traffic(config: Config, variant: str) -> LayerTraffic:
    """What one more layer of `variant` sends, as the difference between three and two layers; a collective call."""
    two, three = (_count(_shortened(config, variant, layers)) for layers in (2, 3))
    return LayerTraffic(*(b - a for a, b in zip(two, three, strict=True)))


def boundary_traffic(config: Config) -> dict[int, BoundaryTraffic]:
    """What each pipeline rank sends forward, by pipeline rank; a collective call."""
    forward, _, _, tokens = _run(_short_pipeline(config))
    sent = forward.total("send")
    mine = BoundaryTraffic(sent.elements / tokens, sent.bytes / tokens)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (parallel_state.get_pipeline_model_parallel_rank(), mine))
    parallel_state.destroy_model_parallel()
    return dict(everyone)


def _short_pipeline(config: Config) -> Config:
    """Two layers a model chunk, of which the first starts a chain exactly where the chunk's first layer does."""
    parallel = config.parallel
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    transformer, starts = build_transformer_config(config), chain_starts(config.model)
    # chunk c of pipeline rank p is the (c pp + p)-th along the model
    firsts = [
        get_transformer_layer_offset(transformer, chunk if vpp > 1 else None, rank)
        for chunk in range(vpp)
        for rank in range(pp)
    ]
    full = [2 * k for k, first in enumerate(firsts) if first in starts]
    changes = {
        "num_layers": 2 * pp * vpp,
        "rank": _low_rank(config.model),
        "full_rank_layers": full if config.model.variant == "crnet" else None,
    }
    return _with_model(config, changes, keep_pipeline=True)


def _low_rank(model: ModelConfig) -> dict[str, int | list[int]]:
    """Ranks of the last layer that is not full rank, for every layer."""
    low = [row for row in model_ranks(model) if row["q"]] or [dict.fromkeys(POSITIONS, 1)]
    return dict(low[-1])


def _shortened(config: Config, variant: str, layers: int) -> Config:
    full = [0] if variant == "crnet" else None
    changes = {"variant": variant, "num_layers": layers, "full_rank_layers": full, "rank": _low_rank(config.model)}
    return _with_model(config, changes, keep_pipeline=False)


def _with_model(config: Config, changes: dict[str, Any], *, keep_pipeline: bool) -> Config:
    parallel, tp = config.parallel, config.parallel.tensor_model_parallel_size
    uneven: dict[str, Any] = {
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
    }
    if not keep_pipeline:
        uneven |= {"pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": None}
    dp = dist.get_world_size() // tp // (parallel.pipeline_model_parallel_size if keep_pipeline else 1)
    micro_batches = parallel.pipeline_model_parallel_size
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=8 * tp, max_position_embeddings=None, **changes),
        training=dataclasses.replace(
            config.training, micro_batch_size=1, global_batch_size=dp * micro_batches, seq_length=4 * tp
        ),
        parallel=dataclasses.replace(parallel, **uneven),
        deepspeed={"zero_optimization": {"stage": 1}},  # has every layout and dtype, and sends the same
    )


def _count(short: Config) -> tuple[float, ...]:
    """The fields of `LayerTraffic`, for all layers of this rank."""
    forward, passes, gradients, tokens = _run(short)
    ranks = tuple(dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group()))
    counters = ((forward, tokens), (passes, tokens), (gradients, 1))
    volumes: list[tuple[Traffic, int]] = [(c.total(*TENSOR_PARALLEL_KINDS, ranks=ranks), n) for c, n in counters]
    parallel_state.destroy_model_parallel()
    return (*(volume.elements / n for volume, n in volumes), *(volume.bytes / n for volume, n in volumes))


def _run(config: Config) -> tuple[CommunicationCounter, CommunicationCounter, CommunicationCounter, int]:
    """Counters of a forward pass, of a step's passes and of its gradient reduction, and this rank's tokens."""
    context = initialize_parallel(config)
    engine = TrainEngine(config, build_model_chunks(config), context)
    count, length = config.training.global_batch_size // context.dp_size, config.training.seq_length
    positions = torch.arange(length, device=context.device).unsqueeze(0)
    batch = dict.fromkeys(("tokens", "labels"), positions % config.model.vocab_size)
    batches = [{**batch, "position_ids": positions, "loss_mask": torch.ones_like(positions, dtype=torch.float)}] * count
    forward, passes, gradients = (CommunicationCounter() for _ in range(3))
    with forward:
        engine.evaluate(batches)
    engine.calibrate_output_norms(batches)  # no part of an ordinary step
    with passes:
        engine.accumulate(batches, count * context.dp_size * length)
    with gradients:
        engine.reduce_gradients()
    engine.deepspeed.destroy()
    context.heartbeat.close()
    return forward, passes, gradients, count * length
