"""The time of a step by a roofline: products at a share of the peak, all else at memory's and links' speed, no overlap.

What is left out, so that a real step takes longer: kernel launches, imbalance between ranks, stragglers, data loading,
evaluation and checkpoints. What would make it shorter: communication that runs beside products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_crnet.config.batch import BatchPlan
from megatron_crnet.config.deepspeed_rules import zero_stage
from megatron_crnet.planning.figures import PIPELINE, TENSOR, Flow, Memory
from megatron_crnet.planning.machines import Machine
from megatron_crnet.planning.memory import grouped, padded
from megatron_crnet.planning.operations import Operations
from megatron_crnet.planning.shards import Chunk, LocalModel
from megatron_crnet.recompute.planner import layer_widths

ACTIVATION_USES = 4
"""Each activation is written and read in forward, and so is its gradient in backward."""
LAUNCHES, LAUNCH_SECONDS = 400, 5e-6
"""Kernels of a layer in one micro-batch's forward and backward pass, and the host's time for each: stated guesses."""
REBUILT_USES, REBUILT_LAUNCHES = 2, LAUNCHES // 3
"""What a layer adds that backward rebuilds: its activations written and read once more, a forward pass's kernels."""
HOST_ADAM_BANDWIDTH = 20e9
"""Bytes a second of host memory for each GPU when the optimizer is offloaded: a stated guess."""

Part = tuple[LocalModel, Memory, Operations, list[Flow]]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step; the parts follow one another.

    Attributes:
        products: matrix products and attention of the slowest stage.
        element_wise: its norms, activations and residuals, by memory bandwidth.
        launches: what the device waits because the host cannot start so many small kernels faster.
        tensor_parallel, pipeline, data_parallel: communication.
        bubble: waiting for other stages at both ends of the schedule.
        update: the optimizer.
    """

    products: float
    element_wise: float
    launches: float
    tensor_parallel: float
    pipeline: float
    bubble: float
    data_parallel: float
    update: float

    @property
    def total(self) -> float:
        """The step."""
        return (
            self.products
            + self.element_wise
            + self.launches
            + self.tensor_parallel
            + self.pipeline
            + self.bubble
            + self.data_parallel
            + self.update
        )


def estimate_time(parts: list[Part], plan: BatchPlan, machine: Machine, crossings: dict[str, float]) -> StepTime:
    """The step of the stage that takes longest."""
    return max((_stage_time(part, plan, machine, crossings) for part in parts), key=lambda time: time.total)


def _stage_time(part: Part, plan: BatchPlan, machine: Machine, crossings: dict[str, float]) -> StepTime:
    model, memory, operations, flows = part
    peak = machine.peak(model.config.training.dtype)
    # kernels on GPUs skip the masked half of attention, which the counter counts
    products = (operations.total - operations.attention / 2) / (peak * machine.product_efficiency)
    element_wise = plan.num_microbatches * _activation_bytes(model, plan) / machine.memory_bandwidth
    seconds = dict.fromkeys(("TP", "PP", "rest"), 0.0)
    for flow in flows:
        kind = flow.group if flow.group in (TENSOR, PIPELINE) else "rest"
        seconds[kind] += _flow_time(flow, machine, crossings[flow.group])
    kernels = sum(len(chunk.layers) * LAUNCHES + len(_rebuilt(chunk)) * REBUILT_LAUNCHES for chunk in model.chunks)
    launches = max(0.0, plan.num_microbatches * kernels * LAUNCH_SECONDS - products - element_wise)
    busy = products + element_wise + launches + seconds["TP"] + seconds["PP"]
    return StepTime(
        products=products,
        element_wise=element_wise,
        launches=launches,
        tensor_parallel=seconds["TP"],
        pipeline=seconds["PP"],
        bubble=busy * (model.pp - 1) / (plan.num_microbatches * len(model.chunks)),
        data_parallel=seconds["rest"],
        update=_update_time(model, memory, plan, machine),
    )


def _flow_time(flow: Flow, machine: Machine, crossing: float) -> float:
    """What leaves a node is spread over the network ports of the group's ranks there, but for messages."""
    share = math.ceil(crossing) if flow.kind == "send" else crossing
    slowest = max(1 / machine.node_bandwidth, share / machine.network_bandwidth)
    return flow.wire_bytes * slowest / machine.link_efficiency


def _rebuilt(chunk: Chunk) -> list[int]:
    """The layers that backward computes once more."""
    return [layer for segment in chunk.segments for layer in segment]


def _activation_bytes(model: LocalModel, plan: BatchPlan) -> float:
    """What a micro-batch writes and reads, whether or not it is kept."""
    size = 2 if model.config.training.dtype == "bf16" else 4
    tokens = plan.micro_batch_size * plan.seq_length
    local = tokens // model.tp if model.transformer.sequence_parallel else tokens
    uses = [(layer, ACTIVATION_USES) for chunk in model.chunks for layer in chunk.layers]
    uses += [(layer, REBUILT_USES) for chunk in model.chunks for layer in _rebuilt(chunk)]
    layers = sum(times * layer_widths(model.transformer, layer).activations for layer, times in uses)
    logits = tokens * model.config.model.vocab_size // model.tp * (size + 4) * ACTIVATION_USES
    return layers * local * size + (logits if model.chunks[-1].predicts else 0)


def _update_time(model: LocalModel, memory: Memory, plan: BatchPlan, machine: Machine) -> float:
    """Moments, masters and gradients are read, and all but the gradients written."""
    if memory.host:
        # gradients down, weights up; masters, moments and gradients read in the host's memory, all but the last written
        share = sum(padded(group, plan.dp_size, zero_stage(model.config)) for group in grouped(model)) / plan.dp_size
        moved = share * (4 + 2)
        return moved / (machine.host_bandwidth * machine.link_efficiency) + 28 * share / HOST_ADAM_BANDWIDTH
    return (2 * memory.optimizer + memory.optimizer / 3 + memory.weights) / machine.memory_bandwidth
