"""Peak bytes of one rank in a step, by formula: state to 1%, peak to 10%.

Derived from DeepSpeed's optimizers (`bf16_optimizer.py`, `zero/stage_1_and_2.py`, `zero/stage3.py`) and this project's
layers, whose activations `recompute/planner.py` sizes. docs/planning.md has the table of the state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_crnet.config.batch import BatchPlan
from megatron_crnet.config.cuda_graphs import uses_cuda_graphs
from megatron_crnet.config.deepspeed import DEFAULT_BUCKET, offloads_optimizer, zero_option
from megatron_crnet.config.megatron import CRNetTransformerConfig
from megatron_crnet.engine.adam8bit import BLOCK, CHUNK
from megatron_crnet.model.block import boundary_size, boundary_widths
from megatron_crnet.model.glue import FEW
from megatron_crnet.planning.distillation import boundary_width, kept_differences, teacher_weights
from megatron_crnet.planning.galore import galore_share
from megatron_crnet.planning.profile import Memory
from megatron_crnet.planning.shards import PROJECTED, SPREAD, Chunk, LocalModel, expert_weights
from megatron_crnet.planning.volume import partitioned, persistent, prefetched, zero3_gathers
from megatron_crnet.recompute.planner import kept_widths, layer_widths, passes_in_flight, sums_beside_outputs

SUB_GROUP = 1_000_000_000
"""DeepSpeed's default of `sub_group_size`: elements that stage 3 updates at once."""
FEW_BYTES = {("swiglu", True): 24, ("swiglu", False): 12, ("gelu", True): 16, ("gelu", False): 8}
"""Bytes of temporary tensors per element in the backward of an activation, by it and by whether tensors are bf16."""
EIGHT_BIT_UPDATE = 17
"""Bytes of temporary tensors per element of `adam8bit.update_blocks`."""
GALORE_UPDATE = 16
"""Bytes per element of the largest projected matrix: gradient, direction, what is sent and received, or with a new
projection the gradient and its singular vectors. The workspace of the decomposition itself is not in it."""


def estimate_memory(model: LocalModel, plan: BatchPlan, on_gpu: bool = False) -> Memory:
    """The memory of a rank of this stage.

    Args:
        on_gpu: AdamW is fused, and a CUDA graph keeps the memory of the passes.
    """
    state = _offloaded(model, plan) if offloads_optimizer(model.config) else _state(model, plan.dp_size, on_gpu)
    state["reduction"] = max(state["reduction"], model.partial_bytes(plan.dp_size) if model.tp > 1 else 0)
    state |= _frozen(model, state, plan.dp_size)
    state["weights"] += teacher_weights(model)
    layers = [layer for chunk in model.chunks for layer in chunk.layers]
    gathers_tokens = model.config.parallel.moe_token_dispatcher_type == "allgather"
    gathers = (
        (gathers_tokens and model.transformer.expert_model_parallel_size > 1)
        or model.chunks[-1].predicts
        or any(model.transformer.table.is_full_rank(layer) for layer in layers)
    )
    replicas = model.spread if gathers_tokens else 1
    if (model.transformer.sequence_parallel and gathers) or replicas > 1:
        # Megatron-Core's buffer for the whole sequence, the input of a full-rank column layer, or those of experts
        state["buffers"] += replicas * model.tokens * model.config.model.hidden_size * model.element
    state |= {"kept": _kept(model, plan), "transient": _transient(model, plan)}
    if on_gpu and uses_cuda_graphs(model.config):
        for name in ("reduction", "update"):
            state[name] += state["kept"] + state["transient"]
    if model.stage == 3:
        state["start"] = (model.numel + model.frozen_numel) * model.element + teacher_weights(model)
    return Memory(**{name: round(value) for name, value in state.items()})


def _state(model: LocalModel, dp: int, fuses_adam: bool = False) -> dict[str, float]:
    """State with the optimizer on the device, and memory for reduction and update; betas count as bf16."""
    stage, bf16, n, size = model.stage, model.bf16, model.padded(dp), model.element
    bucket, tensor = 4 * model.buffer, max(p.numel for p in model.parameters)
    share, own = _largest_share(model, dp), model.partition(dp)
    state: dict[str, float] = {"weights": n * size, "optimizer": 4 * own + _optimizer_state(model, own, dp)}
    state |= {"reduction": 0, "update": _update(model, share, dp, fuses_adam)}
    if stage == 0:
        copies = 4 if bf16 else 0
        optimizer = n * copies + _optimizer_state(model, n, dp)
        at_once = min(_reduced_at_once(model, dp), DEFAULT_BUCKET + tensor)  # copied together even for one replica
        state |= {"optimizer": optimizer, "reduction": size * at_once}
        update = _update(model, tensor, dp, fuses_adam) + copies * n
        return {**state, "gradients": n * size, "buffers": 0, "update": update}
    if stage == 1 and bf16:  # flat fp32 gradients, reduced in place
        return {**state, "gradients": 4 * n, "buffers": 0}
    if stage == 1:  # two buckets
        return {**state, "gradients": 4 * n, "buffers": bucket, "reduction": bucket}
    state["gradients"] = 4 * n / dp
    if stage == 2:  # the bucket lives in backward passes
        return {**state, "buffers": 0}
    whole = persistent(model) * size if dp > 1 else 0  # not while the optimizer steps
    group = min(share, zero_option(model.config, "sub_group_size", SUB_GROUP))
    update = max(0.0, 4 * group + _update(model, group, dp, fuses_adam) - whole)
    return {**state, "weights": n / dp * size + whole, "buffers": bucket, "update": update}


def _reduced_at_once(model: LocalModel, dp: int) -> int:
    """Elements that ZeRO-0 sums over replicas in one piece, of which experts that are spread are one of their own."""
    groups = model.padded_groups(dp)
    spread = groups.pop(SPREAD, 0)
    return max(sum(groups.values()), spread if model.replicas(SPREAD, dp) > 1 else 0)


def _frozen(model: LocalModel, state: dict[str, float], dp: int) -> dict[str, float]:
    """What frozen weights add: themselves, and in bf16 their fp32 masters on the host, once merges have made them."""
    n, stage = model.frozen_numel, model.stage
    held = sum(p.numel / (model.replicas(p.kind, dp) if stage else 1) for p in model.weights if p.is_frozen)
    masters = 4 * held if model.bf16 else 0
    return {
        "weights": state["weights"] + n * model.element / (dp if stage == 3 else 1),
        "host": state.get("host", 0) + masters,
    }


def _largest_share(model: LocalModel, dp: int) -> float:
    """Elements that a rank updates of the largest parameter group; ZeRO 2 and 3 keep partial gradients apart."""
    partial = model.partial_numel if model.stage >= 2 else 0
    projected, spread = model.elements(PROJECTED), model.elements(SPREAD)
    others = max(partial, projected, model.numel - partial - projected - spread)
    return max(others / dp, spread / model.replicas(SPREAD, dp))


def _optimizer_state(model: LocalModel, numel: float, dp: int) -> float:
    """Bytes of both moments of this rank's `numel` elements, and of GaLore's projections.

    `engine/adam8bit.py` keeps those of matrices as codes with a scale per block.
    """
    name, every = model.config.optimizer.name, sum(p.numel for p in model.parameters)
    if name == "galore":
        plain = sum(p.numel for p in model.parameters if p.kind != PROJECTED) / every
        return 8 * plain * numel + 4 * galore_share(model, dp).state
    matrices = model.elements("matrix", SPREAD) / every if name == "adamw8bit" else 0
    return (8 * (1 - matrices) + (2 + 8 / BLOCK) * matrices) * numel


def _update(model: LocalModel, numel: float, dp: int, fuses_adam: bool) -> float:
    """Bytes of temporary tensors while the optimizer updates a group of `numel` elements."""
    largest = max(p.numel for p in model.parameters)
    if model.config.optimizer.name == "adamw8bit":
        return EIGHT_BIT_UPDATE * min(numel, largest, CHUNK)  # a parameter at a time
    if model.config.optimizer.name == "galore":
        plain = model.elements("matrix") / (dp if model.stage else 1)
        return max(8 * min(numel, plain), GALORE_UPDATE * galore_share(model, dp).largest)
    return 0 if fuses_adam else 8 * numel


def _offloaded(model: LocalModel, plan: BatchPlan) -> dict[str, float]:
    """The same with the optimizer, and so fp32 weights, moments and gradients, on the host."""
    stage, bf16, n, size, share = model.stage, model.bf16, model.numel, model.element, model.numel / plan.dp_size
    bucket, tensor = 4 * model.bucket if stage == 1 else 0, size * max(p.numel for p in model.parameters)
    state = _state(model, plan.dp_size) | {"optimizer": 0, "update": 0, "gradients": 0}
    if stage == 3:
        return {**state, "host": 20 * share}
    # bf16 gradients accumulate on the device, fp32 ones on the host; weights and a gradient are copied through buffers
    on_host = 0 if bf16 or stage == 1 or plan.num_microbatches == 1 else size * share
    gradients = (4 * share if bf16 else 0) + (size * n if stage == 1 else 0)
    host = (16 + size) * share + tensor + on_host
    return {**state, "gradients": gradients, "buffers": bucket + tensor, "reduction": bucket, "host": host}


def _kept(model: LocalModel, plan: BatchPlan) -> float:
    """Bytes saved for backward by all micro-batches in flight, norm and cross-entropy included."""
    transformer, last, h = model.transformer, model.chunks[-1], model.config.model.hidden_size
    passes = passes_in_flight(transformer, model.pp_rank, plan.num_microbatches)
    width = sum(n * _kept_width(model, chunk) for n, chunk in zip(passes, model.chunks, strict=True))
    width += 2 * h if last.predicts else boundary_size(transformer, last.layers.stop) + boundary_width(model)
    if len(model.chunks) > 1 and not last.predicts and plan.num_microbatches > model.pp:
        width += boundary_size(transformer, last.layers.stop)  # the gradient of the first backward pass has come
    return width * model.local_tokens * model.element + _logits(model, last) + kept_differences(model, passes)


def _copied_experts(model: LocalModel, layers: range) -> int:
    """Bytes of the largest stack of experts' weights that a product takes as a copy."""
    if model.transformer.table.architecture.experts is None:
        return 0
    weights = [weight for layer in layers for same in expert_weights(model, layer) for weight in same]
    count = model.transformer.table.num_experts // model.transformer.expert_model_parallel_size
    return count * model.element * max((weight.elements for weight in weights if weight.is_copied), default=0)


def _kept_width(model: LocalModel, chunk: Chunk) -> float:
    """Elements per local token that one micro-batch saves in the layers of a chunk."""
    transformer, h, last = model.transformer, model.config.model.hidden_size, chunk.layers[-1]
    width = kept_widths(transformer, chunk.layers, chunk.segments)
    if not chunk.embeds:
        # the previous chunk's outputs are received; segments count what they use of them as their own
        used = sum(boundary_widths(transformer, chunk.layers.start)) if chunk.segments else h
        width += boundary_size(transformer, chunk.layers.start) - used
    if chunk.segments:
        return width
    # of the last layer o and down, and Y beside Y + bias, are sent
    sent = 2 * h + sums_beside_outputs(transformer) if transformer.table.has_next(last) else 0
    return width - sent


def _logits(model: LocalModel, chunk: Chunk) -> float:
    """The logits, in whose place the cross-entropy keeps exponentials, and then their gradient."""
    return model.tokens * model.transformer.table.local_vocabulary * model.element if chunk.predicts else 0


def _transient(model: LocalModel, plan: BatchPlan) -> float:
    """The peak beyond `kept` in a backward pass."""
    most = max(moment for chunk in model.chunks for moment in _moments(model, plan, chunk))
    if model.stage < 3 or plan.dp_size == 1:
        return most
    # before the loss what was gathered in the last call lies there twice: in one piece until all of it is in use
    in_one = min(prefetched(model), sum(p.numel for p in partitioned(model)))
    before_loss = in_one * model.element - _logits(model, model.chunks[-1])
    return max(most, before_loss) + zero3_gathers(model)[1] * model.element


def _moments(model: LocalModel, plan: BatchPlan, chunk: Chunk) -> Iterator[float]:
    """Bytes beyond `kept` in the backward of the loss, the output layer and each segment, and at the end."""
    yield -_missing(model, plan)
    received = _received(model, plan)
    if chunk.predicts:
        yield from (moment + received - _missing(model, plan) for moment in _output_layer(model, chunk, received))
    yield from (received + moment for moment in _segments(model, plan, chunk))
    if model.stage == 2 and chunk.embeds:  # nothing is kept any more
        last = max(elements for layer, elements in _reductions(model) if layer < 0)
        left = (model.buffer + model.embedding) * model.element - _kept(model, plan)
        yield left + (_copies(model) - _allocated_late(model, plan)) * last


def _received(model: LocalModel, plan: BatchPlan) -> float:
    """Bytes of tensors from or for other stages that a backward pass finds beside `kept`."""
    transformer, size, first = model.transformer, model.local_tokens * model.element, model.chunks[0]
    if len(model.chunks) > 1:  # of the last stage, the other chunk's output, or the gradient that it has received
        return boundary_size(transformer, first.layers.stop) * size if model.chunks[-1].predicts else 0.0
    if first.embeds or plan.num_microbatches == 1:
        return 0.0
    # under 1F1B the received tensors and their gradients outlive their micro-batch
    return (boundary_size(transformer, first.layers.start) + boundary_width(model)) * size


def _output_layer(model: LocalModel, chunk: Chunk, received: float) -> Iterator[float]:
    """Bytes in the backward of the loss and of the output layer's weights."""
    logits, grad = _logits(model, chunk), model.embedding * model.element
    if model.teacher is not None and model.config.distillation.kd_beta:
        yield 2 * logits + received  # the sum of both losses' gradients, then transposed
    if model.bf16:  # what the loss takes in fp32 for a few tokens
        yield 4 * min(logits / model.element, FEW) + received
    yield grad
    is_tied = chunk.embeds and model.transformer.table.ties_head  # then reduced with the embedding's part, at the end
    if model.stage == 2 and model.embedding > model.bucket and not is_tied:  # reduced by itself
        yield model.buffer * model.element - logits + grad + _copies(model) * model.embedding
    if model.stage == 3 and model.bf16 and not is_tied:
        yield grad + 4 * model.embedding


def _segments(model: LocalModel, plan: BatchPlan, chunk: Chunk) -> Iterator[float]:
    """Bytes in the backward of each segment, or layer without recomputation."""
    transformer, size, last = model.transformer, model.local_tokens * model.element, model.chunks[-1]
    buffer = model.buffer * model.element if model.stage == 2 else 0
    is_sent = not last.predicts and len(model.chunks) == 1  # what is sent is gone in backward
    gone = _logits(model, last) + (boundary_size(transformer, last.layers.stop) * size if is_sent else 0)
    tied = model.embedding * model.element if chunk.predicts and chunk.embeds and transformer.table.ties_head else 0
    widest, few = _widest(transformer), _few_rows(model)
    kept, reductions = kept_widths(transformer, chunk.layers, chunk.segments), _reductions(model)
    for segment in chunk.segments or [range(layer, layer + 1) for layer in chunk.layers]:
        rest = [other for other in chunk.segments if other.start < segment.stop]
        width = kept_widths(transformer, range(chunk.layers.start, segment.stop), rest) - kept + widest
        width += _rebuilt(model, segment, bool(chunk.segments))
        moment = buffer + tied - gone - _missing(model, plan, segment.stop)
        moment += _copied_experts(model, segment)
        yield moment + (width + 2 * widest) * size + few
        together = max((elements for layer, elements in reductions if layer in segment), default=0)
        if together:
            yield moment + width * size + _copies(model) * together


def _reductions(model: LocalModel) -> list[tuple[int, int]]:
    """Of gradients that ZeRO 2 and 3 reduce together, the layer whose backward does it and their elements."""
    found, elements = list[tuple[int, int]](), 0
    for p in reversed(model.parameters) if model.stage >= 2 else ():
        if elements and elements + p.numel > model.bucket:
            found.append((p.layer, elements))
            elements = 0
        elements += p.numel
    return [*found, (-1, elements)]


def _copies(model: LocalModel) -> int:
    """Bytes per element of gradients while they are reduced, beside the buffer: a copy of them, and one in fp32."""
    return 6 if model.bf16 and model.stage == 2 else 4


def _widest(transformer: CRNetTransformerConfig) -> float:
    """Elements per local token of the widest output, or of the widest of all that experts are given."""
    table = transformer.table
    experts = table.architecture.experts
    given = max((max(table.shapes[p.name]) for p in experts.positions), default=0) if experts is not None else 0
    return max(table.topk * given, *(transformer.local_width(name) for name in table.architecture.names))


def _few_rows(model: LocalModel) -> float:
    """Bytes that the plain functions take for a few rows of the activation's gradients."""
    transformer, table = model.transformer, model.transformer.table
    if not table.activates:
        return 0.0
    experts = table.architecture.experts
    width = (
        table.topk * table.shapes[experts.groups[-1].names[0]][0]
        if experts is not None
        else transformer.local_input(table.architecture.rows[-1])
    )
    return min(width * model.local_tokens, FEW) * FEW_BYTES[table.architecture.activation, model.bf16]


def _missing(model: LocalModel, plan: BatchPlan, layers: float = math.inf) -> float:
    """Bytes of `gradients` that a single micro-batch has not allocated when `layers` are left."""
    return sum(p.numel for p in model.parameters if p.layer < layers) * _allocated_late(model, plan)


def _allocated_late(model: LocalModel, plan: BatchPlan) -> float:
    """Bytes per element of `gradients` that are allocated when the first backward pass has computed them."""
    preallocated = model.stage == 3 or (model.stage == 1 and model.bf16) or offloads_optimizer(model.config)
    if plan.num_microbatches > 1 or preallocated:
        return 0.0
    return 4 / plan.dp_size if model.stage == 2 else model.element


def _rebuilt(model: LocalModel, segment: range, is_recomputed: bool) -> float:
    """Elements per local token of the gradients that enter a segment and of what is recomputed of it."""
    transformer, last, after = model.transformer, layer_widths(model.transformer, segment[-1]), segment.stop
    chained = after < transformer.num_layers and transformer.table.has_previous(after)
    entering: float = layer_widths(transformer, after).start if chained else transformer.hidden_size
    if any(after == chunk.layers.stop and not chunk.predicts for chunk in model.chunks):
        entering = boundary_size(transformer, after)
    if not is_recomputed:
        return entering
    if transformer.strategy.repeats_layers:
        return entering + sum(layer_widths(transformer, layer).activations for layer in segment)
    held = segment[-1:] if transformer.strategy.inverts else segment  # division rebuilds one layer at a time
    inner = max(0, last.activations - last.z - last.outputs)
    return entering + sum(layer_widths(transformer, layer).outputs for layer in held) + inner
