"""Traffic of layers and memory of recomputation, counted in passes of the real layers.

For crnet measure-communication and crnet measure-recompute.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._subclasses import FakeTensorMode

from megatron_crnet.config.megatron import build_transformer_config
from megatron_crnet.config.positions import METHODS, position_table
from megatron_crnet.config.recompute_section import RecomputeConfig
from megatron_crnet.config.schema import Config, Variant
from megatron_crnet.config.variants import as_variant, on_one_process
from megatron_crnet.distributed.process_groups import initialize_parallel
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.model.block import CRNetTransformerBlock
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.planning.counted_step import synthetic_batch
from megatron_crnet.planning.counters import CommunicationCounter, LiveMemory, OperationCounter
from megatron_crnet.planning.even_experts import even_experts
from megatron_crnet.planning.shards import build_local_models
from megatron_crnet.recompute.planner import kept_widths


def layer_traffic(config: Config, variant: Variant) -> dict[str, float]:
    """Tensor-parallel volume of a layer: per token of `forward` and of a `step`; per step of `gradients`.

    The difference between three and two layers, in elements and bytes; a collective call.
    """
    two, three = dict[str, float](), dict[str, float]()
    for layers, found in ((2, two), (3, three)):
        *counters, tokens = _count(_shortened(as_variant(config, variant), layers, pp=1, vpp=None))
        ranks = tuple(dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group()))
        for name, counter, per in zip(("forward", "step", "gradients"), counters, (tokens, tokens, 1), strict=True):
            total = counter.total("all_gather", "reduce_scatter", "all_reduce", ranks=ranks)
            found |= {name: total.elements / per, f"{name}_bytes": total.bytes / per}
        parallel_state.destroy_model_parallel()
    return {name: three[name] - two[name] for name in two}


def boundary_traffic(config: Config) -> dict[int, dict[str, float]]:
    """Elements and bytes that each pipeline rank sends forward per token; a collective call.

    Counted with two layers per model chunk; the first starts a chain if the chunk's first layer does.
    """
    parallel, starts = config.parallel, position_table(config.model).chain_starts
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    # chunk c of pipeline rank p is the (c pp + p)-th along the model
    chunks = [model.chunks[chunk] for chunk in range(vpp or 1) for model in build_local_models(config)]
    full = [2 * k for k, chunk in enumerate(chunks) if chunk.layers.start in starts]
    variant = config.model.variant
    starts_of = {"full_rank_layers": full} if METHODS[variant].is_chained else {}
    forward, _, _, tokens = _count(_shortened(as_variant(config, variant), 2 * len(chunks), pp, vpp, **starts_of))
    sent, everyone = forward.total("send"), list[Any]([None]) * dist.get_world_size()
    mine = {"elements": sent.elements / tokens, "bytes": sent.bytes / tokens}
    dist.all_gather_object(everyone, (parallel_state.get_pipeline_model_parallel_rank(), mine))
    parallel_state.destroy_model_parallel()
    return dict(everyone)


def _shortened(config: Config, layers: int, pp: int, vpp: int | None, **model: Any) -> Config:
    """Few layers of the same widths on few tokens, with the ranks of the last low-rank layer.

    Args:
        model: further fields of the model.
    """
    tp = config.parallel.tensor_model_parallel_size
    rank: Any = position_table(config.model).last_factored or 1
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, num_layers=layers, vocab_size=8 * tp, max_position_embeddings=4 * tp, rank=rank, **model
        ),
        training=dataclasses.replace(
            config.training,
            micro_batch_size=1,
            global_batch_size=dist.get_world_size() // tp // pp * pp,
            seq_length=4 * tp,
        ),
        parallel=dataclasses.replace(
            config.parallel,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            num_layers_in_first_pipeline_stage=None,
            num_layers_in_last_pipeline_stage=None,
        ),
        deepspeed={"zero_optimization": {"stage": 1}},  # takes every layout and dtype
    )


def _count(config: Config) -> tuple[CommunicationCounter, CommunicationCounter, CommunicationCounter, int]:
    """Counters of a forward pass, of a step and of its gradient reduction; tokens of this rank."""
    context = initialize_parallel(config)
    engine = TrainEngine(config, build_model_chunks(config), context)
    count = config.training.global_batch_size // context.dp_size
    batches, tokens = [synthetic_batch(config, context.device)] * count, count * config.training.seq_length
    with CommunicationCounter() as forward:
        engine.evaluate(batches)
    engine.calibrate_output_norms(batches)  # not part of an ordinary step
    with CommunicationCounter() as passes:
        engine.accumulate(batches, tokens * context.dp_size)
    with CommunicationCounter() as gradients:
        engine.reduce_gradients()
    engine.close()
    context.heartbeat.close()
    return forward, passes, gradients, tokens


STRATEGIES = {
    "none": RecomputeConfig(),
    "replay": RecomputeConfig(strategy="replay"),
    "replay, attention kept": RecomputeConfig(strategy="replay", keep_attention_output=True),
    "inverse": RecomputeConfig(strategy="inverse"),
    "inverse, attention kept": RecomputeConfig(strategy="inverse", keep_attention_output=True),
    "full": RecomputeConfig(strategy="full"),
}


def measure_strategies(config: Config, *, fake: bool, segment_length: int | None = None) -> list[dict[str, Any]]:
    """Measure every strategy on one micro-batch of the decoder layers, in one process.

    Args:
        fake: use fake tensors.
        segment_length: also measure `replay` and `full` with it.
    """
    single, strategies = on_one_process(config), dict(STRATEGIES)
    if segment_length:
        for name in ("replay", "full"):
            changed = dataclasses.replace(strategies[name], segment_length=segment_length)
            strategies[f"{name}, segments of {segment_length}"] = changed
    context = initialize_parallel(single)
    try:
        return [{"name": n, **_measure(dataclasses.replace(single, recompute=r), fake)} for n, r in strategies.items()]
    finally:
        context.heartbeat.close()
        parallel_state.destroy_model_parallel()


def _measure(config: Config, fake: bool) -> dict[str, Any]:
    """Bytes kept for backward (also by formula), their peak without weights and gradients, and operations."""
    transformer, groups = build_transformer_config(config), ProcessGroupCollection.use_mpu_process_groups()
    tensors = FakeTensorMode() if fake else nullcontext()
    evenly = even_experts(transformer.table) if fake else nullcontext()
    with tensors:
        block = CRNetTransformerBlock(transformer, None, groups, pre_process=True, post_process=False).train()
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
            parameter.grad = torch.zeros_like(parameter)
    if transformer.strategy.inverts:  # for initial betas and equal norms
        even = {layer: torch.ones(len(block.config.table.architecture.names)) for layer in block.layer_range}
        block.plan_inverse_segments({layer: transformer.beta_init * ones for layer, ones in even.items()}, even)
    with tensors, evenly:
        device, batch = next(block.parameters()).device, (config.training.seq_length, config.training.micro_batch_size)
        hidden = torch.randn(*batch, config.model.hidden_size, dtype=transformer.params_dtype, device=device)
        hidden.requires_grad_()
        rotary = None
        if transformer.table.architecture.is_rotary:
            rotary = torch.randn(batch[0], 1, 1, transformer.kv_channels, device=device)
        # in a separate pass, because PyTorch's counter keeps the inputs of modules alive
        with OperationCounter() as operations:
            block(hidden, rotary_pos_emb=rotary).sum().backward()
        hidden.grad = torch.zeros_like(hidden)
        with LiveMemory() as memory:
            # the output and its gradient do not count
            out = block(hidden, rotary_pos_emb=rotary)
            size = out.untyped_storage().nbytes()
            kept = memory.current - size
            grad = torch.ones_like(out)
            memory.reset_peak()
            out.backward(grad)
            peak = max(memory.peak - 2 * size, kept)
    size = hidden[..., 0].numel() * hidden.element_size()
    return {
        "kept": kept,
        "peak": peak,
        "flops": operations.total,
        "formula": kept_widths(transformer, block.layer_range, block.segments) * size,
        "segments": [len(segment) for segment in block.segments],
        "transient": peak - kept,
    }
