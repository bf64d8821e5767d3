"""What the fullest rank holds, from formulas: states as ZeRO divides them, activations as recomputation keeps them.

Fragmentation, communication buffers, and what CUDA and NCCL take for themselves (a few GB) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megatron_crnet.arithmetic import position_shapes
from megatron_crnet.config import Config
from megatron_crnet.deepspeed_rules import zero_stage
from megatron_crnet.ranks import FULL_RANK, chain_starts, model_ranks
from megatron_crnet.recompute_plan import ANCHOR_DISTANCE, layer_widths, micro_batches_in_flight, plan_segments
from megatron_crnet.rules import sequence_parallel
from megatron_crnet.transformer_config import CRNetTransformerConfig, build_transformer_config


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest rank of the fullest pipeline stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(config: Config, dp_size: int) -> MemoryEstimate:
    """The largest total of any pipeline stage, with `dp_size` data-parallel ranks."""
    stages = [_stage_memory(config, stage, dp_size) for stage in range(config.parallel.pipeline_model_parallel_size)]
    return max(stages, key=lambda memory: memory.total)


def stage_layers(config: Config) -> list[range]:
    """The layers (from 0) of each pipeline stage; with virtual stages as many, but taken to be consecutive."""
    parallel, layers = config.parallel, config.model.num_layers
    pp = parallel.pipeline_model_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    even = pp - (first is not None) - (last is not None)
    each = (layers - (first or 0) - (last or 0)) // max(even, 1)
    counts = [each] * pp
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    return [range(sum(counts[:stage]), sum(counts[: stage + 1])) for stage in range(pp)]


def rank_parameters(config: Config, stage: int) -> int:
    """Parameters of one rank of a pipeline stage.

    Factors on the narrow side of a tensor-parallel split are on every rank: A of q, k, v, gate and up, B of o and down.
    """
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    h, ranks, starts = model.hidden_size, model_ranks(model), chain_starts(model)
    count = 0
    for layer in stage_layers(config)[stage]:
        count += 2 * h
        for position, (h_in, h_out) in position_shapes(model).items():
            rank = ranks[layer][position]
            if rank == FULL_RANK:
                count += h_in * h_out // tp
            else:
                split, whole = (h_in, h_out) if position in ("o", "down") else (h_out, h_in)
                count += rank * (split // tp + whole)
            count += layer not in starts
    if stage == 0:
        count += model.vocab_size * h // tp
    if stage == config.parallel.pipeline_model_parallel_size - 1:
        count += model.vocab_size * h // tp + h
    return count


def _stage_memory(config: Config, stage: int, dp_size: int) -> MemoryEstimate:
    zero, parameters = zero_stage(config), rank_parameters(config, stage)
    size = 2 if config.training.dtype == "bf16" else 4
    # fp32 master and two moments; fp32 without ZeRO needs no copy of the weights
    optimizer = parameters * (8 if config.training.dtype == "fp32" and zero == 0 else 12)
    return MemoryEstimate(
        weights=parameters * size / (dp_size if zero == 3 else 1),
        gradients=parameters * 4 / (dp_size if zero >= 2 else 1),
        optimizer=optimizer / (dp_size if zero >= 1 else 1),
        activations=size * _activations(config, stage) + _logits(config, stage),
    )


def _logits(config: Config, stage: int) -> float:
    """Bytes of the logits and their fp32 copy for the loss, on the last stage."""
    if stage < config.parallel.pipeline_model_parallel_size - 1:
        return 0.0
    tokens = config.training.micro_batch_size * config.training.seq_length
    size = 2 if config.training.dtype == "bf16" else 4
    return tokens * config.model.vocab_size / config.parallel.tensor_model_parallel_size * (size + 4)


def _activations(config: Config, stage: int) -> float:
    """Elements at the peak: what all micro-batches in flight keep, and what backward holds beyond that."""
    transformer = build_transformer_config(config)
    in_flight = micro_batches_in_flight(transformer, stage) * (transformer.virtual_pipeline_model_parallel_size or 1)
    positions = config.training.micro_batch_size * config.training.seq_length
    if sequence_parallel(config.parallel):
        positions //= config.parallel.tensor_model_parallel_size
    kept, transient = kept_and_transient(transformer, stage_layers(config)[stage], in_flight)
    return positions * (kept * in_flight + transient)


def kept_and_transient(config: CRNetTransformerConfig, layers: range, in_flight: float) -> tuple[float, float]:
    """Elements for each local position that one micro-batch keeps, and that backward holds beyond them at its peak.

    At the peak there are a rebuilt segment, one layer's own activations, and the gradients that enter and leave it.
    """
    widths = {layer: layer_widths(config, layer) for layer in layers}
    gradients = 2 * max(w.start for w in widths.values())
    if config.recompute_strategy == "none":
        return sum(w.activations for w in widths.values()), gradients
    full, inverse = config.recompute_strategy == "full", config.recompute_strategy == "inverse"
    kept = peak = 0.0
    for segment in _anchored(config, layers) if inverse else plan_segments(config, layers, in_flight):
        of_layers = [widths[layer] for layer in segment]
        kept += of_layers[0].start + (len(segment) - 1) * config.hidden_size * inverse
        if not full:
            attention = sum(w.attention for w in of_layers) if config.recompute_keep_attention_output else 0
            kept += sum(w.z for w in of_layers) + attention
        if full:
            held = sum(w.activations for w in of_layers)
        else:  # inverse goes down one layer at a time
            held = max(w.outputs for w in of_layers) if inverse else sum(w.outputs for w in of_layers)
            held += max(w.activations for w in of_layers)
        # the segments above are gone when this one is rebuilt
        peak = max(peak, kept + held + gradients)
    return kept, peak - kept


def _anchored(config: CRNetTransformerConfig, layers: range) -> list[range]:
    """The segments of `inverse` where its guard adds no anchor."""
    length = config.recompute_segment_length or ANCHOR_DISTANCE
    edges = sorted({layers.start, *range(layers.stop, layers.start, -length)})
    return [range(start, stop) for start, stop in pairwise(edges)]
