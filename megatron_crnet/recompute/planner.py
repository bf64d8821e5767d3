"""Where a pipeline stage's layers are cut into segments for activation recomputation.

Widths are elements for each local sequence position: for each of the s/t positions of a rank with sequence
parallelism, of the s positions without. Formulas and drawings: docs/recomputation.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor

from megatron_crnet.config.megatron import CRNetTransformerConfig

INVERSE_SEGMENT_LENGTH = 8
"""The paper keeps Y at L/8 layers: every eighth, the last one included and the first not."""

ROUNDING = {"bf16": 2.0**-8, "fp32": 2.0**-24}
"""Largest relative error of one rounding."""


@dataclass(frozen=True)
class LayerWidths:
    """What one layer costs, in elements for each local sequence position.

    Attributes:
        start: the residual stream and the outputs that enter it.
        z: low-rank outputs.
        attention: attention's output.
        outputs: the residual stream and the outputs that a rebuilt layer holds, and z gathered over the sequence.
        activations: everything that backward needs when nothing is recomputed.
        stream: what is kept so that the residual stream behind the layer can be rebuilt: what experts gave.
    """

    start: float
    z: float
    attention: float
    outputs: float
    activations: float
    stream: float = 0.0


def layer_widths(config: CRNetTransformerConfig, layer: int) -> LayerWidths:
    """The widths of layer `layer` (from 0)."""
    table, h, t = config.table, config.hidden_size, config.tensor_model_parallel_size
    architecture, ranks = table.architecture, table.padded_ranks[layer]
    width = {name: config.local_width(name) for name in architecture.names}
    all_outputs, residual = sum(width.values()), sum(width[name] for name in architecture.rows)
    low_rank = sum(ranks[name] for name in architecture.names)
    z = 0 if table.has_dense(layer) else low_rank
    chained = table.has_previous(layer) or table.has_next(layer)
    # rebuilding gathers z of the column groups and holds it until the layer's backward
    gathered = t * (z - sum(ranks[name] for name in architecture.rows)) if t > 1 else 0
    inner = 4 * h + sum(config.local_input(name) for name in architecture.rows)  # norms' inputs and outputs
    has_next = table.has_next(layer)
    # beside the outputs themselves, kept by the norms of heads, in the memory of those beside them, or for the next
    # layer's backward
    of_heads, scales_later = architecture.groups[0].names[:2], has_next and not config.next_layer_scales
    rotates_outputs = architecture.is_rotary and not architecture.has_biases
    if architecture.has_qk_norm or (rotates_outputs and (table.is_full_rank(layer) or scales_later)):
        inner += sum(width[name] for name in of_heads)
    inner += sums_beside_outputs(config) if has_next else 0
    if table.method.has_silu:
        inner += z  # silu(z), beside the z that its gradient takes
    inner += expert_activations(config, layer)
    return LayerWidths(
        start=h + (all_outputs if table.has_previous(layer) else 0),
        z=z,
        attention=config.local_input(architecture.attention),
        outputs=h + (all_outputs + (gathered if config.sequence_parallel else 0) if chained else residual),
        activations=inner + low_rank + (all_outputs if has_next else all_outputs - residual),
        stream=h if architecture.experts is not None and not table.has_dense(layer) else 0,
    )


def expert_activations(config: CRNetTransformerConfig, layer: int) -> float:
    """What backward needs of router and experts, where tokens are spread evenly, in the unit of `LayerWidths`."""
    table = config.table
    if table.architecture.experts is None:
        return 0
    # in fp32: the router's input, logits, weights and probabilities
    found = 2 * config.hidden_size if config.bf16 else 0.0
    found = (found + (2 if config.bf16 else 1) * 3 * table.num_experts) / table.topk
    for group in table.architecture.experts.groups:
        width, outputs = table.shapes[group.names[0]][0], sum(table.shapes[name][1] for name in group.names)
        z = sum(table.padded_ranks[layer][name] for name in group.names)
        # what is multiplied by the tokens' weights is kept before and after
        scaled = (z or width) if group.is_row else 0
        found += width + z + scaled + (z if table.method.has_silu else 0) + (0 if group.is_row else outputs)
    return table.topk * found


def sums_beside_outputs(config: CRNetTransformerConfig) -> int:
    """Widths of Y + bias that backward of a layer needs where the next layer's needs Y."""
    architecture = config.table.architecture
    groups = architecture.with_kept_sums if architecture.has_biases else ()
    return sum(config.local_width(name) for group in groups for name in group.names)


def kept_widths(config: CRNetTransformerConfig, layers: range, segments: list[range]) -> float:
    """Elements for each local sequence position that a pass of one micro-batch leaves for backward.

    Args:
        layers: of a stage, numbers from 0.
        segments: how they are cut; empty without recomputation.
    """
    widths = {layer: layer_widths(config, layer) for layer in layers}
    if not segments:
        return sum(w.activations for w in widths.values())
    strategy = config.strategy
    kept = sum(widths[segment.start].start - _stream(config, widths[segment[-1]]) for segment in segments)
    kept += sum(_kept_of_layer(config, w) for w in widths.values())
    if strategy.inverts:
        kept += sum((len(segment) - 1) * config.hidden_size for segment in segments)
        kept += widths[layers[-1]].start - config.hidden_size if len(segments[-1]) > 1 else 0
    return kept


def _kept_of_layer(config: CRNetTransformerConfig, widths: LayerWidths) -> float:
    """What is kept of every layer, wherever segments start; `_stream` not of the last of a segment."""
    if not config.strategy.saves_z:
        return 0
    return widths.z + (widths.attention if config.recompute_keep_attention_output else 0) + _stream(config, widths)


def _stream(config: CRNetTransformerConfig, widths: LayerWidths) -> float:
    return widths.stream if config.strategy.saves_z and not config.strategy.inverts else 0


def passes_in_flight(config: CRNetTransformerConfig, pp_rank: int, micro_batches: int | None = None) -> list[int]:
    """Forward passes of each chunk of pipeline rank `pp_rank` whose kept tensors are alive at once.

    Args:
        micro_batches: of a step; None for more than any schedule has in flight.
    """
    pp, vpp = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    chunks, passes = vpp or 1, pp - pp_rank
    if vpp is not None:
        passes = (pp - pp_rank - 1) * 2 + (vpp - 1) * pp + 1
    if micro_batches is not None:
        passes = min(passes, micro_batches * chunks)
    return [sum(k // pp % chunks == chunk for k in range(passes)) for chunk in range(chunks)]


def initial_segments(config: CRNetTransformerConfig, layers: range, pp_rank: int) -> list[range]:
    """Segments of a chunk's layers by the configuration alone: none yet under `inverse`, where values decide."""
    strategy = config.strategy
    if not strategy.recomputes or strategy.inverts:
        return []
    return plan_segments(config, layers, fmean(passes_in_flight(config, pp_rank)))


def plan_segments(config: CRNetTransformerConfig, layers: range, in_flight: float = 1) -> list[range]:
    """Segments of the layers (numbers from 0) of a stage for the strategies `replay` and `full`."""
    # a full-rank layer cannot be rebuilt from low-rank outputs; alone, its outputs are the next segment's start
    cuts = set()
    saves_z = config.strategy.saves_z
    if saves_z:
        cuts = {edge for layer in layers if config.table.has_dense(layer) for edge in (layer, layer + 1)}
    if config.recompute_segment_length is not None:
        return _equal_segments(layers, config.recompute_segment_length, cuts)
    widths = [layer_widths(config, layer) for layer in layers]
    costs = tuple(
        (w.start - _stream(config, w), _kept_of_layer(config, w), w.outputs if saves_z else w.activations)
        for w in widths
    )
    lengths = cheapest_lengths(costs, frozenset(cut - layers.start for cut in cuts), in_flight)
    return _ranges(layers.start, lengths)


def _ranges(start: int, lengths: Sequence[int]) -> list[range]:
    segments = []
    for length in lengths:
        segments.append(range(start, start + length))
        start += length
    return segments


def _equal_segments(layers: range, length: int, cuts: set[int]) -> list[range]:
    edges = sorted({layers.start, layers.stop, *(cut for cut in cuts if layers.start < cut < layers.stop)})
    return [
        range(start, min(start + length, stop))
        for first, stop in pairwise(edges)
        for start in range(first, stop, length)
    ]


@cache
def cheapest_lengths(
    costs: tuple[tuple[float, float, float], ...], cuts: frozenset[int], in_flight: float
) -> list[int]:
    """Lengths of segments, from the first layer on, with the least peak.

    While a segment is recomputed, the later segments are gone already, so the earlier ones may be longer.
    With several micro-batches in flight, the kept tensors of the others are added.

    Args:
        costs: of each layer: what is kept if a segment starts there, what is kept in any case, and what it holds
            while its segment is recomputed.
        cuts: layers at which a segment must start.
        in_flight: micro-batches that are kept at once.
    """
    count = len(costs)
    # best[end][segments]: least peak over the first `end` layers, what they keep, and where the last one starts
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}] + [{} for _ in range(count)]
    for end in range(1, count + 1):
        kept = transient = 0.0
        for start in range(end - 1, -1, -1):
            kept, transient = kept + costs[start][1], transient + costs[start][2]
            for segments, (peak, below, _) in best[start].items():
                keeps = below + costs[start][0] + kept
                found = max(peak, keeps + transient), keeps, start
                if segments + 1 not in best[end] or found < best[end][segments + 1]:
                    best[end][segments + 1] = found
            if start in cuts:
                break
    segments = min(best[count], key=lambda n: best[count][n][0] + (in_flight - 1) * best[count][n][1])
    edges, end = [], count
    for left in range(segments, 0, -1):
        start = best[end][left][2]
        edges.append(end - start)
        end = start
    return edges[::-1]


def amplification_limit(config: CRNetTransformerConfig) -> float:
    """How many roundings' worth of error `inverse` may accumulate over a segment."""
    dtype = "bf16" if config.bf16 else "fp32"
    return config.recompute_inverse_tolerance / ROUNDING[dtype]


def plan_inverse_segments(
    config: CRNetTransformerConfig, layers: range, scales: Mapping[int, Tensor], norm_ratios: Mapping[int, Tensor]
) -> tuple[list[range], int]:
    """Segments under `inverse`, and how many of their checkpoints the guard has added.

    A segment starts after the layer at which the estimated error of some position would pass `amplification_limit`.

    Args:
        scales: s(beta) of the positions of each layer with a residual, on the host.
        norm_ratios: |Y_l| / |Y_{l-1}| of the same, the largest of any token.
    """
    limit, longest = amplification_limit(config), config.recompute_segment_length or INVERSE_SEGMENT_LENGTH
    segments, added, stop = [], 0, layers.stop
    errors = torch.zeros(())
    for layer in reversed(layers):
        if layer == layers.start:
            break
        guarded = False
        if config.table.has_previous(layer):
            errors = errors_of_previous(errors, scales[layer], norm_ratios[layer])
            guarded = not bool((errors <= limit).all())  # NaN is guarded, too
        if guarded or not config.table.has_previous(layer) or stop - layer == longest:
            added += guarded and stop - layer < longest
            segments.append(range(layer, stop))
            stop, errors = layer, torch.zeros(())
    segments.append(range(layers.start, stop))
    return segments[::-1], added


def errors_of_previous(errors: Tensor, scales: Tensor, norm_ratios: Tensor) -> Tensor:
    """Relative errors of the previous layer's outputs, from those of a layer's own outputs, by position.

    Y_{l-1} = (Y_l - z B) / s divides the error of Y_l, and what the forward pass rounded off it, by s, and is
    rounded itself; in norms of a token's output, relative to the smaller or larger Y_{l-1}. The forward pass also
    rounds s Y_{l-1}, and the difference is rounded once more: both are of the size of Y_{l-1} and not amplified.
    Roundings to nearest are unbiased and those of different layers independent, so their norms add in squares. Each
    counts with its largest size, 2.4 times the usual one, which also covers the two and the arithmetic's own in fp32.

    Args:
        errors: in roundings (`ROUNDING`), by position or a scalar.
        scales: s(beta), by position.
        norm_ratios: |Y_l| / |Y_{l-1}|, by position.
    """
    one = torch.ones((), device=errors.device)
    return torch.hypot(torch.hypot(errors, one) * norm_ratios / scales.abs(), one)
