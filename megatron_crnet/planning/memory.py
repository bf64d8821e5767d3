"""Bytes that one rank holds at the peak of a step, by part, from formulas.

What is allocated follows from DeepSpeed's optimizers (`bf16_optimizer.py`, `zero/stage_1_and_2.py`, `zero/stage3.py`)
and from this project's layers. Sizes of activations are elements for each local sequence position, as in
`recompute/planner.py`; derivations are in docs/planning.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_crnet.config.batch import BatchPlan
from megatron_crnet.config.deepspeed_rules import (
    DEFAULT_BUCKET,
    offloads_optimizer,
    reduce_bucket_size,
    zero_option,
    zero_stage,
)
from megatron_crnet.config.megatron import CRNetTransformerConfig
from megatron_crnet.model.block import boundary_widths
from megatron_crnet.planning.figures import Memory
from megatron_crnet.planning.shards import Chunk, LocalModel
from megatron_crnet.planning.zero3 import estimate_gathers
from megatron_crnet.recompute.planner import kept_widths, layer_widths, micro_batches_in_flight

DEFAULT_SUB_GROUP = 1_000_000_000
"""DeepSpeed's sub_group_size: elements of a rank's share that stage 3 updates at once."""


@dataclass(frozen=True)
class Group:
    """Parameters that DeepSpeed flattens into one buffer (`optimizer.parameter_groups`).

    Attributes:
        numels: elements of each parameter.
        size: bytes of one element as the passes use it.
        is_partial: from ZeRO 2 on, whether their gradients are partial sums over tensor-parallel ranks.
    """

    numels: list[int]
    size: int
    is_partial: bool


def grouped(model: LocalModel) -> list[Group]:
    """The parameter groups of a rank."""
    stage, bf16 = zero_stage(model.config), model.config.training.dtype == "bf16"
    found: dict[tuple[bool, bool, bool], list[int]] = {}
    for p in model.parameters:
        found.setdefault((p.is_matrix, stage >= 2 and p.is_partial, bf16 and p.is_beta), []).append(p.numel)
    # ZeRO-3 packs beta's group in bf16, too
    return [
        Group(numels, 4 if not bf16 or (is_beta and stage < 3) else 2, is_partial)
        for (_, is_partial, is_beta), numels in sorted(found.items())
    ]


def padded(group: Group, dp_size: int, stage: int) -> int:
    """Elements of the flat buffer: cut evenly over replicas, on even addresses."""
    if stage == 0:
        return sum(group.numels)
    if stage == 3:
        return sum(_up(numel, dp_size) for numel in group.numels)
    return _up(sum(group.numels), 2 * dp_size)


def _bucket(model: LocalModel) -> int:
    """Elements of the buffer in which gradients are summed."""
    return reduce_bucket_size(model.config, sum(parameter.numel for parameter in model.parameters))


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def estimate_memory(model: LocalModel, plan: BatchPlan) -> Memory:
    """The parts of a rank of this stage."""
    state = _state(model, plan)
    state["buffers"] += _gathered(model, plan)
    return Memory(**state, kept=round(_kept(model, plan)), transient=round(_transient(model, plan)))


def _gathered(model: LocalModel, plan: BatchPlan) -> int:
    """Megatron-Core's buffer for the whole sequence before a full-rank column layer, under sequence parallelism."""
    layers = [layer for chunk in model.chunks for layer in chunk.layers]
    needed = any(model.transformer.is_full_rank(layer) for layer in layers) or model.chunks[-1].predicts
    tokens = plan.micro_batch_size * plan.seq_length
    return (
        tokens * model.config.model.hidden_size * _element(model)
        if needed and model.transformer.sequence_parallel
        else 0
    )


def _state(model: LocalModel, plan: BatchPlan) -> dict[str, int]:
    stage, bf16, dp = zero_stage(model.config), model.config.training.dtype == "bf16", plan.dp_size
    groups = grouped(model)
    sizes = [padded(group, dp, stage) for group in groups]
    whole, largest = sum(sizes), max(sizes)
    weights = sum(size * group.size for size, group in zip(sizes, groups, strict=True))
    numel, tensor = sum(sum(g.numels) for g in groups), max(max(g.numels) for g in groups)
    bucket = _bucket(model)
    offloaded = offloads_optimizer(model.config)
    if stage == 0:
        size = 2 if bf16 else 4
        return {
            "weights": weights,
            "gradients": numel * size,
            "optimizer": numel * (12 if bf16 else 8),
            "buffers": 0,
            "reduction": size * min(numel, DEFAULT_BUCKET + tensor),
            "update": 8 * tensor + (4 * numel if bf16 else 0),
        }
    update = 8 * largest // dp
    if stage == 1 and bf16 and not offloaded:
        # one flat fp32 gradient for each group, summed in one piece
        return {
            "weights": weights,
            "gradients": 4 * whole,
            "optimizer": 12 * whole // dp,
            "buffers": 0,
            "reduction": 4 * whole,
            "update": update,
        }
    # of ZeRO-3's weights each rank has its share, and some are whole
    whole_weights = estimate_gathers(model, plan).live * _element(model) if stage == 3 else 0
    state: dict[str, int] = {
        "weights": weights // dp + whole_weights if stage == 3 else weights,
        "optimizer": 12 * whole // dp,
        "buffers": 4 * bucket,
        "reduction": 0,
        "update": update,
    }
    if offloaded:
        return {**state, "optimizer": 0, "update": 0, **_offloaded(model, plan)}
    if stage == 1:
        # DeepSpeed takes a second bucket when it sums
        return {**state, "gradients": 4 * numel, "reduction": 4 * bucket}
    if stage == 2:
        # the bucket lives in backward passes
        return {**state, "gradients": 4 * whole // dp, "buffers": 0}
    # a sub-group's gradients are copied before its update, when no weight is whole
    copied = min(largest // dp, zero_option(model.config, "sub_group_size", DEFAULT_SUB_GROUP))
    return {**state, "gradients": 4 * whole // dp, "update": max(0, 12 * copied - whole_weights)}


def _offloaded(model: LocalModel, plan: BatchPlan) -> dict[str, int]:
    """What differs with the optimizer on the host: masters, moments and fp32 gradients are there, and what is below."""
    stage, bf16, size = zero_stage(model.config), model.config.training.dtype == "bf16", _element(model)
    groups = grouped(model)
    numel, tensor = sum(sum(g.numels) for g in groups), max(max(g.numels) for g in groups)
    share = sum(padded(group, plan.dp_size, stage) for group in groups) // plan.dp_size
    bucket = 4 * _bucket(model)
    if stage == 3:
        # gradients of all micro-batches are summed on the host
        return {"gradients": 0, "host": 20 * share}
    # in bf16 gradients are summed on the device, in fp32 on the host; updated weights and one tensor's gradient pass
    # through memory of their own
    sums = 4 * share if bf16 else 0
    sums_on_host = 0 if bf16 or stage == 1 or plan.num_microbatches == 1 else size * numel // plan.dp_size
    return {
        "gradients": sums + (size * numel if stage == 1 else 0),
        "buffers": (bucket if stage == 1 else 0) + size * tensor,
        "reduction": bucket if stage == 1 else 0,
        "host": (16 + size) * share + size * tensor + sums_on_host,
    }


def _local_tokens(model: LocalModel, plan: BatchPlan) -> int:
    tokens = plan.micro_batch_size * plan.seq_length
    return tokens // model.tp if model.transformer.sequence_parallel else tokens


def _element(model: LocalModel) -> int:
    return 2 if model.config.training.dtype == "bf16" else 4


def _kept(model: LocalModel, plan: BatchPlan) -> float:
    """Activations of all micro-batches in flight."""
    transformer, size = model.transformer, _element(model)
    flight = min(micro_batches_in_flight(transformer, model.pp_rank), plan.num_microbatches)
    local = _local_tokens(model, plan)
    body = sum(_body(model, chunk) for chunk in model.chunks) * local * size
    ends = sum(_ends(model) * local * size + _head(model, plan) for chunk in model.chunks if chunk.predicts)
    last = model.chunks[-1]
    sent = 0 if last.predicts else sum(boundary_widths(transformer, last.layers.stop)) * local * size
    return flight * body + ends + sent


def _body(model: LocalModel, chunk: Chunk) -> float:
    """Width of what one micro-batch leaves in a chunk's layers."""
    transformer, h = model.transformer, model.config.model.hidden_size
    kept = kept_widths(transformer, chunk.layers, chunk.segments)
    if chunk.segments:
        return kept
    # outputs of the layer below arrive with the micro-batch; o and down of the last layer go on, or are not used again
    received = 0 if chunk.embeds else sum(boundary_widths(transformer, chunk.layers.start)) - h
    last = chunk.layers[-1]
    chained = transformer.has_previous(last) or transformer.has_next(last)
    return kept + received - (2 * h if chained else 0)


def _ends(model: LocalModel) -> float:
    """Width of the final norm's input and output."""
    return 2 * model.config.model.hidden_size


def _head(model: LocalModel, plan: BatchPlan) -> float:
    """Exponentials of the logits in fp32, which the cross-entropy keeps."""
    return plan.micro_batch_size * plan.seq_length * model.config.model.vocab_size // model.tp * 4


def _transient(model: LocalModel, plan: BatchPlan) -> float:
    """The most beyond what is kept, over the moments of a backward pass."""
    # ZeRO 2 makes its bucket at the first gradient, when the loss has been differentiated
    bucket = 0
    if zero_stage(model.config) == 2:
        bucket = _bucket(model) * _element(model)
    # the gradient of bf16 logits is made beside that of the fp32 ones, which takes the exponentials' place
    losses = [_head(model, plan) / 2 for chunk in model.chunks if chunk.predicts and _element(model) == 2]
    moments = [bucket + moment for chunk in model.chunks for moment in _moments(model, plan, chunk)]
    received, unmade = _received(model, plan), _unmade(model, plan)
    return max(-unmade, *(loss + 2 * received - unmade for loss in losses), *(moment + received for moment in moments))


def _unmade(model: LocalModel, plan: BatchPlan, layers: int | None = None) -> float:
    """Bytes of gradients that the only micro-batch has yet to make when `layers` are left; all if not given."""
    stage, bf16 = zero_stage(model.config), model.config.training.dtype == "bf16"
    if plan.num_microbatches > 1 or stage == 3 or (stage == 1 and bf16) or offloads_optimizer(model.config):
        return 0.0  # or there is a place for all of them from the start
    owners = ((p.numel, p.owner.partition(".")[0]) for p in model.parameters)
    numel = sum(
        numel
        for numel, owner in owners
        if layers is None or owner == "embedding" or (owner.isdigit() and int(owner) < layers)
    )
    return numel * (4 / plan.dp_size if stage == 2 else _element(model))


def _received(model: LocalModel, plan: BatchPlan) -> float:
    """What a stage receives for one micro-batch.

    Under 1F1B that of the micro-batch before and its gradient outlive it: counted, both are there when the next loss is
    differentiated, one when its layers are.
    """
    first = model.chunks[0]
    if first.embeds or plan.num_microbatches == 1 or len(model.chunks) > 1:
        return 0.0
    width = sum(boundary_widths(model.transformer, first.layers.start))
    return width * _local_tokens(model, plan) * _element(model)


def _moments(model: LocalModel, plan: BatchPlan, chunk: Chunk) -> Iterator[float]:
    transformer, size, local = model.transformer, _element(model), _local_tokens(model, plan)
    head = _head(model, plan) if chunk.predicts else 0.0
    vocabulary = model.config.model.vocab_size // model.tp
    if chunk.predicts:
        # the gradient of the output layer's weights, and its copy in the dtype in which gradients are summed
        yield vocabulary * model.config.model.hidden_size * _copies(model) - head - _unmade(model, plan)
    kept = kept_widths(transformer, chunk.layers, chunk.segments)
    for segment in chunk.segments or [range(layer, layer + 1) for layer in chunk.layers]:
        below = kept_widths(
            transformer, range(chunk.layers.start, segment.stop), [s for s in chunk.segments if s.start < segment.stop]
        )
        width = below - kept + _rebuilt(transformer, segment, bool(chunk.segments))
        absent = head + _unmade(model, plan, segment.stop)
        yield width * local * size - absent
        # a bucket is full when weights have their gradients, and what those took to compute is gone
        yield (width - _intermediates(transformer)) * local * size - absent + _cut_bucket(model, plan, segment)


def _cut_bucket(model: LocalModel, plan: BatchPlan, segment: range) -> float:
    """ZeRO 2 and 3: the fp32 copy of a full bucket on its way to the replicas, if one fills while `segment` runs.

    At ZeRO 2 with what this pass has cut before, which joins the gradients of other micro-batches at its end.
    """
    stage = zero_stage(model.config)
    if stage < 2:
        return 0.0
    bucket = _bucket(model)
    part = 4 / plan.dp_size if stage == 2 and plan.num_microbatches > 1 else 0.0
    filled = cut = 0
    largest = 0.0
    for parameter in reversed(model.parameters):
        layer, _, _ = parameter.owner.partition(".")
        if filled and filled + parameter.numel > bucket:
            if layer.isdigit() and int(layer) in segment:
                largest = max(largest, 4 * filled + part * cut)
            filled, cut = 0, cut + filled
        filled += parameter.numel
    return largest


def _copies(model: LocalModel) -> int:
    """Bytes of a weight's gradient while it is added to the sum."""
    bf16, stage = model.config.training.dtype == "bf16", zero_stage(model.config)
    return 6 if bf16 and stage >= 1 else _element(model)


def _rebuilt(transformer: CRNetTransformerConfig, segment: range, is_recomputed: bool) -> float:
    """What exists beside kept tensors while the last layer of a segment is differentiated."""
    widths = [layer_widths(transformer, layer) for layer in segment]
    gradients = _gradients(transformer, segment) + _intermediates(transformer)
    if not is_recomputed:
        return gradients
    if transformer.recompute_strategy == "full":
        return gradients + sum(w.activations for w in widths)
    inner = widths[-1].activations - widths[-1].z - widths[-1].outputs
    # `inverse` walks down one layer at a time
    outputs = widths[-1].outputs if transformer.recompute_strategy == "inverse" else sum(w.outputs for w in widths)
    return gradients + outputs + max(inner, 0)


def _gradients(transformer: CRNetTransformerConfig, segment: range) -> float:
    """Gradients of activations in the last layer of a segment, with what enters it from above."""
    above = segment.stop < transformer.num_layers and transformer.has_previous(segment.stop)
    entering = layer_widths(transformer, segment.stop).start if above else transformer.hidden_size
    return entering + _widest(transformer)


def _intermediates(transformer: CRNetTransformerConfig) -> float:
    """What computing the gradient of the widest output takes: in bf16 two fp32 tensors and the residual's result."""
    return _widest(transformer) * (5 if transformer.bf16 else 2)


def _widest(transformer: CRNetTransformerConfig) -> float:
    return transformer.width("up") / (1 if transformer.sequence_parallel else transformer.tensor_model_parallel_size)
