"""Bytes that one rank sends and receives in a step, by kind of call and group of ranks.

Volumes as in `planning/communication.py`: an all-gather's output, a reduce-scatter's input, an all-reduce as both.
Derived from the code that calls: `model/linear.py`, `model/lowrank.py`, Megatron-Core's parallel layers, DeepSpeed's
optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_crnet.config.batch import BatchPlan
from megatron_crnet.config.deepspeed_rules import offloads_optimizer, zero_stage
from megatron_crnet.config.deepspeed_settings import is_plain
from megatron_crnet.config.positions import POSITIONS
from megatron_crnet.model.block import boundary_widths, interleaved_width
from megatron_crnet.planning.figures import DATA, MODEL, PIPELINE, STAGE, TENSOR, WORLD, Flow, merged
from megatron_crnet.planning.memory import grouped, padded
from megatron_crnet.planning.operations import outputs_are_kept
from megatron_crnet.planning.shards import Chunk, LocalModel
from megatron_crnet.planning.zero3 import estimate_gathers

COLUMNS, ROWS = ("q", "k", "v", "gate", "up"), ("o", "down")
ONE_MEGATRON_LAYER = 2
"""Megatron-Core's parallel layers of one kind in a full-rank layer."""


def estimate_flows(model: LocalModel, plan: BatchPlan) -> list[Flow]:
    """Everything that a rank of this stage sends in a step."""
    return merged(
        [
            *_tensor_parallel(model, plan),
            *_pipeline(model, plan),
            *_data_parallel(model, plan),
            *_norm_and_loss(model, plan),
            *_anchors(model, plan),
        ]
    )


def _group(model: LocalModel, plan: BatchPlan, name: str) -> tuple[str, int]:
    """The smallest group with the same ranks, and its size."""
    sizes = {
        TENSOR: model.tp,
        PIPELINE: model.pp,
        DATA: plan.dp_size,
        MODEL: model.tp * model.pp,
        STAGE: model.tp * plan.dp_size,
        WORLD: model.tp * model.pp * plan.dp_size,
    }
    parts = {TENSOR: {TENSOR}, PIPELINE: {PIPELINE}, DATA: {DATA}, MODEL: {TENSOR, PIPELINE}, STAGE: {TENSOR, DATA}}
    wider = {part for part in parts.get(name, {TENSOR, PIPELINE, DATA}) if sizes[part] > 1}
    same = [group for group, own in parts.items() if {part for part in own if sizes[part] > 1} == wider]
    return (same[0] if same else WORLD), sizes[name]


def _tensor_parallel(model: LocalModel, plan: BatchPlan) -> Iterator[Flow]:
    if model.tp == 1:
        return
    size, tokens = element_size(model), plan.micro_batch_size * plan.seq_length

    def flow(kind: str, width: float, calls: int, of_size: int = size) -> Flow:
        factor = 2 if kind == "all_reduce" else 1
        count = plan.num_microbatches
        return Flow(kind, TENSOR, model.tp, calls * count, round(factor * tokens * width * of_size) * count)

    for chunk in model.chunks:
        for layer in chunk.layers:
            times = _forward_passes(model, chunk, layer)
            make = _full_rank_layer if model.transformer.is_full_rank(layer) else _low_rank_layer
            for kind, width, calls in make(model, layer, times):
                yield flow(kind, width, calls)
        for kind, width, calls in _embedding(model, chunk):
            yield flow(kind, width, calls)
        if chunk.predicts:
            # maximum, target's logit and sum of exponentials, of every token
            yield flow("all_reduce", 3, 3, 4)
    yield from _partial_gradients(model, plan)


Call = tuple[str, float, int]
"""Kind, width in elements for each token, number of calls; of one micro-batch."""


def _forward_passes(model: LocalModel, chunk: Chunk, layer: int) -> tuple[int, int]:
    """How often products with A or full-rank weights communicate as in forward, and how often z is gathered so."""
    if model.transformer.recompute_strategy == "full" and chunk.segments:
        return 2, 2
    segment = next((segment for segment in chunk.segments if layer in segment), None)
    again = segment is not None and not outputs_are_kept(model, chunk, segment, layer)
    if segment is not None and model.transformer.recompute_strategy == "inverse" and len(segment) > 1:
        again = False  # outputs come from the layer above
    # `replay` keeps z; what it gathers while rebuilding, backward does not gather again
    return (2 if again and model.transformer.is_full_rank(layer) else 1), 1


def _low_rank_layer(model: LocalModel, layer: int, times: tuple[int, int]) -> Iterator[Call]:
    ranks = model.transformer.ranks[layer]
    columns, rows = sum(ranks[p] for p in COLUMNS), sum(ranks[p] for p in ROWS)
    if model.transformer.sequence_parallel:
        yield "all_gather", times[1] * columns + columns + rows, 2 * times[1] + 4
        yield "reduce_scatter", times[0] * rows + columns, 2 * times[0] + 2
    else:
        yield "all_reduce", times[0] * rows + columns, 2 * times[0] + 2


def _full_rank_layer(model: LocalModel, layer: int, times: tuple[int, int]) -> Iterator[Call]:
    h, pairs = model.config.model.hidden_size, ONE_MEGATRON_LAYER
    if model.transformer.sequence_parallel:
        # a column layer gathers its input forward and once more for the gradient of its weights
        yield "all_gather", (times[0] + 2) * pairs * h, (times[0] + 2) * pairs
        yield "reduce_scatter", (times[0] + 1) * pairs * h, (times[0] + 1) * pairs
    else:
        yield "all_reduce", (times[0] + 1) * pairs * h, (times[0] + 1) * pairs


def _embedding(model: LocalModel, chunk: Chunk) -> Iterator[Call]:
    h, sp = model.config.model.hidden_size, model.transformer.sequence_parallel
    if chunk.embeds:
        yield from [("reduce_scatter", h, 1), ("all_gather", h, 1)] if sp else [("all_reduce", h, 1)]
    if chunk.predicts:
        # as a full-rank column layer
        yield from [("all_gather", 2 * h, 2), ("reduce_scatter", h, 1)] if sp else [("all_reduce", h, 1)]


def _partial_gradients(model: LocalModel, plan: BatchPlan) -> Iterator[Flow]:
    """Once a step, one call for each dtype."""
    stage = zero_stage(model.config)
    plain = model.config.training.dtype == "bf16" and stage == 0
    numel = sum(p.numel for p in model.parameters if p.is_partial)
    if stage >= 2:
        # what has been cut between replicas already
        numel = sum(padded(group, plan.dp_size, stage) for group in grouped(model) if group.is_partial) // plan.dp_size
    if numel:
        yield Flow("all_reduce", TENSOR, model.tp, 1, 2 * numel * (2 if plain else 4))


def _pipeline(model: LocalModel, plan: BatchPlan) -> Iterator[Flow]:
    if model.pp == 1:
        return
    width = interleaved_width(model.transformer)
    tokens = plan.micro_batch_size * plan.seq_length
    local = tokens // (model.tp if model.transformer.sequence_parallel else 1)
    widths = [
        # forward from a chunk's end, and its gradient from the beginning of the next
        width or sum(boundary_widths(model.transformer, edge))
        for chunk in model.chunks
        for edge in ([] if chunk.predicts else [chunk.layers.stop]) + ([] if chunk.embeds else [chunk.layers.start])
    ]
    count = plan.num_microbatches
    volume = count * sum(widths) * local * element_size(model)
    yield Flow("send", PIPELINE, model.pp, count * len(widths), volume)


def _data_parallel(model: LocalModel, plan: BatchPlan) -> Iterator[Flow]:
    stage, bf16, dp = zero_stage(model.config), model.config.training.dtype == "bf16", plan.dp_size
    groups = grouped(model)
    numel = sum(sum(group.numels) for group in groups)
    whole = sum(padded(group, dp, stage) for group in groups)
    times = plan.num_microbatches if stage >= 2 else 1
    if stage < 3:
        size = 2 if bf16 and stage == 0 else 4
        # bf16 at stage 1 sums flat buffers with their padding, but not where the optimizer is on the host
        summed = whole if bf16 and stage == 1 and not offloads_optimizer(model.config) else numel
        yield Flow("all_reduce", DATA, dp, times, times * 2 * summed * size)
    if stage in (1, 2):
        volume = sum(padded(group, dp, stage) * group.size for group in groups)
        yield Flow("all_gather", DATA, dp, len(groups), volume)
    if stage == 3:
        yield Flow("reduce_scatter", DATA, dp, times, times * whole * 4)
        gathered = estimate_gathers(model, plan)
        yield Flow("all_gather", DATA, dp, gathered.calls, gathered.numel * element_size(model))
        if bf16:
            # the exact betas, after the update
            betas = [-(-p.numel // dp) * dp for p in model.parameters if p.is_beta]
            yield Flow("all_gather", DATA, dp, len(betas), 4 * sum(betas))


def _norm_and_loss(model: LocalModel, plan: BatchPlan) -> Iterator[Flow]:
    """A few numbers a step: the loss's sum and count in fp64, and the gradient norm."""
    name, size = _group(model, plan, WORLD)
    yield Flow("all_reduce", name, size, 1, 2 * 2 * 8)
    stage, bf16 = zero_stage(model.config), model.config.training.dtype == "bf16"
    offloaded = offloads_optimizer(model.config)
    whole_model, replicas = _group(model, plan, MODEL), _group(model, plan, DATA)
    if stage == 0:
        if is_plain(model.config):
            yield from (Flow("all_reduce", *group, 1, 2 * 4) for group in (whole_model, replicas))
        return
    if stage == 1 and bf16 and not offloaded:
        yield Flow("all_reduce", *whole_model, 1, 2 * 4)
        return
    # ZeRO sums the norm of each parameter group, in fp64 at stage 3 on devices; in bf16 it also asks whether all is
    # finite
    count, size = len(grouped(model)), 8 if stage == 3 and not offloaded else 4
    for group in (replicas, whole_model):
        yield Flow("all_reduce", *group, count, count * 2 * size)
        if bf16 and stage < 3:
            yield Flow("all_reduce", *group, 1, 2 * 1)


def _anchors(model: LocalModel, plan: BatchPlan) -> Iterator[Flow]:
    """Under `inverse`, after each update: the largest growth of every position, and how many anchors were added."""
    if model.transformer.recompute_strategy != "inverse":
        return
    noted = sum(model.transformer.has_previous(layer) for chunk in model.chunks for layer in chunk.layers)
    yield Flow("all_reduce", *_group(model, plan, STAGE), 1, 2 * noted * len(POSITIONS) * 4)
    yield Flow("all_reduce", *_group(model, plan, PIPELINE), 1, 2 * 8)


def element_size(model: LocalModel) -> int:
    """Bytes of a weight and an activation."""
    return 2 if model.config.training.dtype == "bf16" else 4
