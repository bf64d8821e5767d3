"""The time of a step by a roofline without overlap, and the operations it is based on.

Operations are those of PyTorch's counter: 2 m k n for a product of [m, k] and [k, n], twice that in backward; attention
without the causal mask, 2 products of s x s forward and 5 backward. docs/planning.md lists the assumptions.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron_crnet.config.batch import BatchPlan
from megatron_crnet.config.cuda_graphs import uses_cuda_graphs
from megatron_crnet.config.deepspeed import offloads_optimizer
from megatron_crnet.planning.galore import galore_share
from megatron_crnet.planning.machines import Machine
from megatron_crnet.planning.profile import CommVolume, Crossing, Memory, Peers
from megatron_crnet.planning.shards import Chunk, LocalModel, expert_weights
from megatron_crnet.planning.volume import repeats_outputs
from megatron_crnet.recompute.planner import layer_widths

ACTIVATION_USES = 4
"""Reads and writes of an activation and its gradient."""
LAUNCHES, LAUNCH_SECONDS = 400, 5e-6
"""Kernels per layer and micro-batch, and the launch time of one: assumed."""
FORWARD_USES = 2
"""The same of a pass without backward."""
REBUILT_USES, REBUILT_LAUNCHES = 2, LAUNCHES // 3
"""The same for what a recomputed layer adds."""
HOST_ADAM_BANDWIDTH = 20e9
"""Bytes per second of host memory per GPU when the optimizer is offloaded: assumed."""


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one rank in a step.

    Attributes:
        passes: forward and backward without recomputation, and the forward pass of a teacher.
        attention: share of attention in both.
        update: of GaLore's projections, in fp32.
    """

    passes: int
    recomputation: int
    attention: int
    update: int = 0

    @property
    def total(self) -> int:
        """All operations."""
        return self.passes + self.recomputation + self.update


def estimate_operations(model: LocalModel, plan: BatchPlan) -> Operations:
    """Operations of a rank of this stage."""
    table = model.transformer.table
    attention = 4 * model.tokens * plan.seq_length * table.local_shapes[table.architecture.attention][0]
    passes = again = attended = 0
    for chunk in model.chunks:
        for layer in chunk.layers:
            (inputs, outputs), frozen = _layer_products(model, layer), _frozen_products(model, layer)
            experts, frozen_experts = _expert_products(model, layer)
            again += bool(chunk.segments) * (experts + frozen_experts)  # they run again in any case
            passes += 3 * (inputs + outputs + experts) + 2 * (frozen + frozen_experts) + attention * 7 // 2
            repeated, with_attention = _repeats(model, chunk, layer)
            again += repeated[0] * (inputs + frozen) + repeated[1] * outputs + with_attention * attention
            attended += attention * 7 // 2 + with_attention * attention
        if chunk.predicts:
            passes += 6 * model.tokens * model.embedding
    for chunk in model.teacher.chunks if model.teacher else ():
        experts = sum(_expert_products(model.teacher, layer)[0] for layer in chunk.layers) if model.teacher else 0
        passes += len(chunk.layers) * (_full_rank_products(model) + attention) + experts
        attended += len(chunk.layers) * attention
        if chunk.predicts:
            passes += 2 * model.tokens * model.embedding
    count = plan.num_microbatches
    update = galore_share(model, plan.dp_size).operations if model.config.optimizer.name == "galore" else 0
    return Operations(passes * count, again * count, attended * count, update)


def _layer_products(model: LocalModel, layer: int) -> tuple[int, int]:
    """Forward operations per micro-batch: products with A or full-rank weights, and with B."""
    tokens, local, table = model.tokens, model.local_tokens, model.transformer.table
    shapes, ranks, rows = table.local_shapes, table.padded_ranks[layer], table.architecture.rows
    if table.is_full_rank(layer):
        return _full_rank_products(model), 0
    # split over the width, else over the sequence if that is sharded
    inputs = sum(2 * ranks[p] * (tokens if p in rows else local) * n for p, (n, _) in shapes.items())
    outputs = sum(2 * ranks[p] * (local if p in rows else tokens) * n for p, (_, n) in shapes.items())
    return inputs, outputs


def _expert_products(model: LocalModel, layer: int) -> tuple[int, int]:
    """Forward operations per micro-batch of router and experts, where tokens are spread evenly: with weights that are
    trained, and with frozen ones."""
    table, tokens = model.transformer.table, model.local_tokens
    if table.architecture.experts is None:
        return 0, 0
    dense, factors = (sum(weight.elements for weight in same) for same in expert_weights(model, layer))
    trained, frozen = (factors, dense) if factors else (dense, 0)
    router = 2 * tokens * model.config.model.hidden_size * table.num_experts
    return router + 2 * tokens * table.topk * trained, 2 * tokens * table.topk * frozen


def _full_rank_products(model: LocalModel) -> int:
    return sum(2 * model.tokens * h_in * h_out for h_in, h_out in model.transformer.table.local_shapes.values())


def _frozen_products(model: LocalModel, layer: int) -> int:
    """Forward operations per micro-batch with frozen weights, whose gradient no pass computes."""
    table = model.transformer.table
    return _full_rank_products(model) if table.has_dense(layer) and not table.is_full_rank(layer) else 0


def _repeats(model: LocalModel, chunk: Chunk, layer: int) -> tuple[tuple[bool, bool], bool]:
    """Whether backward repeats products with A or full-rank weights, with B, and attention."""
    if not chunk.segments:
        return (False, False), False
    if model.transformer.strategy.repeats_layers:
        return (True, True), True
    again, transformer = repeats_outputs(model, chunk, layer), model.transformer
    return (again and transformer.table.has_dense(layer), again), not transformer.recompute_keep_attention_output


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step; the parts follow one another.

    Attributes:
        matmul: matrix products and attention.
        elementwise: norms, activations and residuals, by memory bandwidth.
        launches: time that kernel launches take beyond matmul and elementwise.
        tensor_parallel, pipeline, data_parallel: communication; that of experts counts as the group's of their ranks.
        bubble: idle time of the pipeline schedule.
        update: the optimizer.
    """

    matmul: float
    elementwise: float
    launches: float
    tensor_parallel: float
    pipeline: float
    bubble: float
    data_parallel: float
    update: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(dataclasses.astuple(self))


def estimate_time(
    model: LocalModel,
    plan: BatchPlan,
    machine: Machine,
    memory: Memory,
    operations: Operations,
    volumes: list[CommVolume],
    crossings: dict[str, Crossing],
) -> StepTime:
    """The time of a step on a rank of this stage; `crossings` as in `node_crossings`."""
    # kernels on GPUs skip the masked half of attention
    useful = operations.passes + operations.recomputation - operations.attention / 2
    matmul = useful / (machine.peak(model.config.training.dtype) * machine.product_efficiency)
    elementwise = plan.num_microbatches * _activation_bytes(model) / machine.memory_bandwidth
    seconds: dict[str, float] = dict.fromkeys(Peers, 0.0)
    for volume in volumes:
        seconds[volume.group] += _transfer_time(volume, machine, crossings[volume.group].of(volume.kind))
    kernels = sum(LAUNCHES * len(c.layers) + REBUILT_LAUNCHES * sum(map(len, c.segments)) for c in model.chunks)
    kernels += sum(REBUILT_LAUNCHES * len(chunk.layers) for chunk in model.teacher.chunks) if model.teacher else 0
    launches = max(0.0, plan.num_microbatches * kernels * LAUNCH_SECONDS - matmul - elementwise)
    if machine.is_gpu and uses_cuda_graphs(model.config):
        launches = 0.0
    in_passes = seconds[Peers.TENSOR] + seconds[Peers.EXPERT]
    busy = matmul + elementwise + launches + in_passes + seconds[Peers.PIPELINE]
    return StepTime(
        matmul=matmul,
        elementwise=elementwise,
        launches=launches,
        tensor_parallel=in_passes,
        pipeline=seconds[Peers.PIPELINE],
        bubble=busy * (model.pp - 1) / (plan.num_microbatches * len(model.chunks)),
        data_parallel=sum(seconds[g] for g in (Peers.DATA, Peers.EXPERT_DATA, Peers.STAGE, Peers.EMBEDDING)),
        update=_update_time(model, memory, plan, machine)
        + operations.update / (machine.peak("fp32") * machine.product_efficiency),
    )


def _transfer_time(volume: CommVolume, machine: Machine, crossing: float) -> float:
    """Traffic between nodes uses the ports of all ranks of the group on a node; a message that of its rank."""
    share = math.ceil(crossing) if volume.kind == "send" else crossing
    slowest = max(1 / machine.node_bandwidth, share / machine.network_bandwidth)
    return volume.wire_bytes * slowest / machine.link_efficiency


def _activation_bytes(model: LocalModel) -> float:
    """Bytes of activations that a micro-batch reads and writes."""
    uses = [(layer, ACTIVATION_USES) for chunk in model.chunks for layer in chunk.layers]
    uses += [(n, REBUILT_USES) for chunk in model.chunks for segment in chunk.segments for n in segment]
    layers = sum(times * layer_widths(model.transformer, layer).activations for layer, times in uses)
    if model.teacher is not None:
        its_layers = (layer for chunk in model.teacher.chunks for layer in chunk.layers)
        layers += FORWARD_USES * sum(layer_widths(model.teacher.transformer, n).activations for n in its_layers)
    logits = model.tokens * model.transformer.table.local_vocabulary * (model.element + 4) * ACTIVATION_USES
    return layers * model.local_tokens * model.element + (logits if model.chunks[-1].predicts else 0)


def _update_time(model: LocalModel, memory: Memory, plan: BatchPlan, machine: Machine) -> float:
    """fp32 weights, moments and gradients are read; weights and moments are written."""
    if offloads_optimizer(model.config):
        # gradients and weights are copied; the state is read and written in the host's memory
        share = model.numel / plan.dp_size
        return share * (6 / (machine.host_bandwidth * machine.link_efficiency) + 28 / HOST_ADAM_BANDWIDTH)
    return (2 * memory.optimizer + memory.optimizer / 3 + memory.weights) / machine.memory_bandwidth
