"""Communication volume of one rank in a step by kind of call and group, to 10%.

Conventions as in `planning/counters.py`. Derived from `model/linear.py`, `model/lowrank.py`, Megatron-Core's parallel
layers and DeepSpeed's optimizers; scalars (loss, norm, overflow) are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate

from megatron_crnet.config.batch import BatchPlan
from megatron_crnet.config.deepspeed import offloads_optimizer, zero_option
from megatron_crnet.config.recompute_section import STRATEGIES
from megatron_crnet.model.block import boundary_size
from megatron_crnet.planning.distillation import boundary_width, embedding_call, teacher_traffic
from megatron_crnet.planning.galore import galore_share
from megatron_crnet.planning.profile import CommVolume, Peers
from megatron_crnet.planning.shards import SPREAD, Chunk, LocalModel, LocalParameter

CROSS_ENTROPY = 3 * 4
"""Bytes per token that cross-entropy all-reduces: maximum, target's logit, sum of exponentials."""
COUNTER = 8
"""Bytes of an integer."""


def estimate_volumes(model: LocalModel, plan: BatchPlan) -> list[CommVolume]:
    """The volumes of a rank of this stage."""
    found, count = defaultdict[tuple[str, str], float](float), plan.num_microbatches
    for kind, width in _experts(model) if model.transformer.expert_model_parallel_size > 1 else ():
        found[expert_group(model, plan.dp_size), kind] += count * model.spread * model.tokens * width * model.element
    if model.tp > 1:
        of_chunks = (call for chunk in model.chunks for call in _tensor_parallel(model, chunk))
        for kind, width in (*of_chunks, *teacher_traffic(model)):
            factor = 2 if kind == "all_reduce" else 1
            found[Peers.TENSOR, kind] += factor * count * model.tokens * width * model.element
        found[Peers.TENSOR, "all_reduce"] += 2 * model.partial_bytes(plan.dp_size)
    at_ends = model.chunks[0].embeds or model.chunks[-1].predicts
    is_tied = model.pp > 1 and model.transformer.table.ties_head and at_ends
    # where replicas keep shards of what they reduce, they sum the gradient of a tied embedding before
    alone = model.stage == 1 and (not model.bf16 or offloads_optimizer(model.config))
    if model.pp > 1:
        found[Peers.PIPELINE, "send"] = count * model.local_tokens * model.element * _boundaries(model)
        if is_tied:
            group: str = Peers.PIPELINE if model.pp == 2 else Peers.EMBEDDING
            found[group, "all_reduce"] = 2 * model.embedding * (model.element if alone else _sum_size(model))
    if plan.dp_size > 1:
        for group, kind, volume in _data_parallel(model, plan):
            found[group, kind] += volume
        if is_tied and alone:
            found[Peers.DATA, "all_reduce"] += 2 * model.embedding * model.element
    sizes: dict[str, int] = {
        Peers.TENSOR: model.tp,
        Peers.PIPELINE: model.pp,
        Peers.DATA: plan.dp_size,
        Peers.STAGE: model.tp * plan.dp_size,
        Peers.EMBEDDING: 2,
        Peers.EXPERT: model.transformer.expert_model_parallel_size,
        Peers.EXPERT_DATA: model.replicas(SPREAD, plan.dp_size),
    }
    if model.config.optimizer.name == "galore":
        replicas = plan.dp_size if model.stage else 1
        group = (Peers.STAGE if model.tp > 1 else Peers.DATA) if replicas > 1 else Peers.TENSOR
        found[group, "all_to_all"] = 4 * galore_share(model, plan.dp_size).exchanged
    return [CommVolume(kind, group, sizes[group], round(n)) for (group, kind), n in sorted(found.items()) if n]


def _tensor_parallel(model: LocalModel, chunk: Chunk) -> Iterator[tuple[str, float]]:
    """Kinds of calls and their elements per token."""
    h, transformer = model.config.model.hidden_size, model.transformer
    sp, full = transformer.sequence_parallel, transformer.strategy.repeats_layers and bool(chunk.segments)
    for layer in chunk.layers:
        table, gathered, reduced = transformer.table, 0, 0
        times = 2 if full or (table.has_dense(layer) and repeats_outputs(model, chunk, layer)) else 1
        if table.has_dense(layer):
            # a column layer gathers its input in forward and for the weights' gradient, if they have one
            pairs = len(table.architecture.rows)
            gathered += (times + (2 if table.is_full_rank(layer) else 1)) * pairs * h
            reduced += (times + 1) * pairs * h
        if table.num_experts and model.config.model.moe_aux_loss_coeff > 0:
            yield "all_reduce", COUNTER * table.num_experts / (model.tokens * model.element)  # tokens of each
        if not table.is_full_rank(layer):
            ranks = table.padded_ranks[layer]
            rows = sum(ranks[p] for p in table.architecture.rows)
            columns = sum(ranks[p] for p in table.architecture.names) - rows
            gathered, reduced = gathered + (times + 1) * columns + rows, reduced + times * rows + columns
        yield from (("all_gather", gathered), ("reduce_scatter", reduced)) if sp else (("all_reduce", reduced),)
    if chunk.embeds:
        yield embedding_call(model), h
        if sp:
            yield "all_gather", h
    if chunk.predicts:
        yield from (("all_gather", 2 * h), ("reduce_scatter", h)) if sp else (("all_reduce", h),)
        yield "all_reduce", CROSS_ENTROPY / model.element


def expert_group(model: LocalModel, dp_size: int) -> str:
    """Name of the group over which experts are spread."""
    size = model.transformer.expert_model_parallel_size
    named = {
        model.tp * dp_size: Peers.STAGE,
        model.tp: Peers.TENSOR,
        **({dp_size: Peers.DATA} if model.tp == 1 else {}),
    }
    return named.get(size, Peers.EXPERT)


def _experts(model: LocalModel) -> Iterator[tuple[str, float]]:
    """Of experts on other ranks, kinds of calls and their elements per token of the group."""
    spread = _gathered if model.config.parallel.moe_token_dispatcher_type == "allgather" else _exchanged
    yield from spread(model)


def _exchanged(model: LocalModel) -> Iterator[tuple[str, float]]:
    """Each token goes to its k experts, with their weights in fp32, and what they give comes back."""
    table, size = model.transformer.table, model.transformer.expert_model_parallel_size
    others = (size - 1) / size
    there_and_back = others * table.topk * (2 * model.transformer.hidden_size + 4 / model.element) / size
    counts = COUNTER * table.num_experts * size / (model.spread * model.tokens * model.element)
    of_teacher = sum(len(chunk.layers) for chunk in model.teacher.chunks) if model.teacher else 0
    forward = of_teacher + sum(len(chunk.layers) * (2 if chunk.segments else 1) for chunk in model.chunks)
    yield "all_to_all", there_and_back * (forward + sum(len(chunk.layers) for chunk in model.chunks))
    yield "all_gather", counts * forward


def _gathered(model: LocalModel) -> Iterator[tuple[str, float]]:
    """All ranks are sent all tokens with the weights of experts, fp32 as what comes back, and a mask."""
    transformer = model.transformer
    h, wide, experts = transformer.hidden_size, 4 / model.element, transformer.table.num_experts
    there, back = h + experts * wide, h * wide
    for chunk in model.chunks:
        passes = 2 if chunk.segments else 1
        yield "all_gather", len(chunk.layers) * (passes * (there + experts / model.element) + back)
        yield "reduce_scatter", len(chunk.layers) * (passes * back + there)
    for chunk in model.teacher.chunks if model.teacher else ():  # forward alone
        yield "all_gather", len(chunk.layers) * (there + experts / model.element)
        yield "reduce_scatter", len(chunk.layers) * back


def repeats_outputs(model: LocalModel, chunk: Chunk, layer: int) -> bool:
    """Whether `replay` or `inverse` repeats the products that compute a layer's outputs."""
    segment = next((segment for segment in chunk.segments if layer in segment), None)
    if segment is None:
        return False
    if model.transformer.strategy.inverts and len(segment) > 1:
        return layer != segment[0]  # they rebuild the previous layer, which the first of a segment does not need
    starts_next = layer == segment[-1] and segment != chunk.segments[-1]  # whose start keeps the outputs
    return not (starts_next and model.transformer.table.has_next(layer))


def _sum_size(model: LocalModel) -> int:
    """Bytes of a gradient element when it is reduced."""
    return 2 if model.bf16 and model.stage == 0 else 4


def _boundaries(model: LocalModel) -> int:
    """Elements per local token: outputs sent from a chunk's end, gradients from its start."""
    edges = [chunk.layers.stop for chunk in model.chunks if not chunk.predicts]
    edges += [chunk.layers.start for chunk in model.chunks if not chunk.embeds]
    besides = boundary_width(model)
    return sum(boundary_size(model.transformer, edge) + besides for edge in edges)


def _data_parallel(model: LocalModel, plan: BatchPlan) -> Iterator[tuple[str, str, float]]:
    """Groups, kinds of calls and bytes."""
    padded, count = model.padded_groups(plan.dp_size), plan.num_microbatches
    if model.stage == 3:
        gathered, _ = zero3_gathers(model)
        # without reduce_scatter, what fits into the buffer is summed in it
        fitting = 0 if zero_option(model.config, "reduce_scatter", True) else model.buffer
        in_it = [p.numel for p in model.parameters if p.numel <= fitting]
        yield Peers.DATA, "all_reduce", count * 2 * 4 * sum(in_it)
        scattered = sum(padded.values()) - sum(-(-numel // plan.dp_size) * plan.dp_size for numel in in_it)
        yield Peers.DATA, "reduce_scatter", count * 4 * scattered
        yield Peers.DATA, "all_gather", (persistent(model) + count * gathered) * model.element
        return
    spread = padded.pop(SPREAD, 0)
    real = model.elements(SPREAD)
    for group, held, numel in (
        (Peers.DATA, sum(padded.values()), model.numel - real),
        (Peers.EXPERT_DATA, spread, real),
    ):
        if group == Peers.DATA or model.replicas(SPREAD, plan.dp_size) > 1:
            summed = held if model.stage == 1 and model.bf16 else numel  # flat buffers are padded
            yield group, "all_reduce", 2 * summed * _sum_size(model) * (count if model.stage == 2 else 1)
            yield group, "all_gather", held * model.element if model.stage else 0


def persistent(model: LocalModel) -> int:
    """Elements of the tensors that ZeRO-3 does not partition, gathered once per step."""
    return sum(p.numel for p in model.weights) - sum(p.numel for p in partitioned(model))


def partitioned(model: LocalModel) -> list[LocalParameter]:
    """The tensors that ZeRO-3 partitions between uses."""
    largest = zero_option(model.config, "stage3_param_persistence_threshold", 100_000)
    return [p for p in model.weights if p.numel > largest]


def prefetched(model: LocalModel) -> int:
    """Elements that ZeRO-3 gathers ahead in one call."""
    return int(zero_option(model.config, "stage3_prefetch_bucket_size", 50_000_000))


def zero3_gathers(model: LocalModel) -> tuple[int, int]:
    """Elements that ZeRO-3 gathers per micro-batch, and the most that are gathered at once, without persistent ones.

    DeepSpeed prefetches in the order of uses up to `max_live_parameters`, and keeps what is used again within
    `max_reuse_distance`. Frozen ones whose use is repeated in backward stay until the layer's gradients are there.
    """
    ahead = prefetched(model)
    limit = zero_option(model.config, "stage3_max_live_parameters", 1_000_000_000) if ahead else 0
    reuse = zero_option(model.config, "stage3_max_reuse_distance", 1_000_000_000)
    sizes = [p.numel for p in partitioned(model)]
    uses = list(_uses(model, model.chunks[0]))
    order = [k for k, _ in uses]
    starts = list(accumulate((sizes[k] for k in order), initial=0))
    following, seen = [len(order)] * len(order), dict[int, int]()
    for i in reversed(range(len(order))):
        following[i] = seen.get(order[i], len(order))
        seen[order[i]] = i
    whole, end, held, most, gathered = set[int](), 0, 0, 0, 0
    for i, (k, stays) in enumerate(uses):
        while end < len(order) and (end <= i or held < limit):
            new = 0 if order[end] in whole else sizes[order[end]]
            whole.add(order[end])
            gathered, held, end = gathered + new, held + new, end + 1
        most, after = max(most, held), following[i]
        if not stays and after >= end and (after == len(order) or starts[after] - starts[i + 1] >= reuse):
            whole.remove(k)
            held -= sizes[k]
    return gathered, most


def _uses(model: LocalModel, chunk: Chunk) -> Iterator[tuple[int, bool]]:
    """Indices of the partitioned tensors in the order of their uses, forward and backward; whether one stays gathered
    until its next use, whatever that takes."""
    transformer, parameters = model.transformer, partitioned(model)
    layers = [p.layer for p in parameters]
    strategy = transformer.strategy if chunk.segments else STRATEGIES["none"]
    yield from ((k, False) for k in range(len(layers)))
    yield from ((k, False) for k in reversed(range(len(layers))) if layers[k] == chunk.layers.stop)
    for segment in reversed(chunk.segments or [range(layer, layer + 1) for layer in chunk.layers]):
        own = [k for k in range(len(layers)) if layers[k] in segment]
        repeated = {layer for layer in segment if strategy.repeats_layers or repeats_outputs(model, chunk, layer)}
        low = {layer for layer in segment if not transformer.table.has_dense(layer)}
        if strategy.repeats_layers:
            yield from ((k, parameters[k].is_frozen) for k in own)
        if strategy.saves_z and not strategy.inverts:
            # recomputes outputs by B, but not those of experts
            yield from ((k, False) for k in own if layers[k] in repeated & low and not parameters[k].is_expert)
        for layer in reversed(segment):
            mine = [k for k in own if layers[k] == layer]
            if strategy.saves_z:  # experts run again in any case
                again = [k for k in mine if layer in repeated | low or parameters[k].is_expert]
                yield from ((k, parameters[k].is_frozen) for k in again)
            yield from ((k, False) for k in reversed(mine))
    yield from ((k, False) for k in range(len(layers)) if layers[k] < 0)
