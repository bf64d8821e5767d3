"""Counts one training step of this rank: live bytes, collective calls, operations.

For real and simulated ranks (`planning/simulation.py`). It intercepts every operation of PyTorch, so it is slow.
"""

from __future__ import annotations

import gc
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_crnet.config.batch import plan_batches
from megatron_crnet.config.deepspeed import zero_stage
from megatron_crnet.config.schema import Config
from megatron_crnet.distributed.process_groups import ParallelContext
from megatron_crnet.engine.distillation import build_teacher
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.engine.schedule import Batch, loss_totals
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.planning.counters import CommunicationCounter, Counters, LiveMemory, OperationCounter
from megatron_crnet.planning.profile import CommVolume, Memory, Peers, StepProfile

Progress = Callable[[int, int], object]
"""Called after each forward pass of a micro-batch with the number of passes done and their total."""


def count_step(config: Config, context: ParallelContext, passed: Progress = lambda *_: None) -> StepProfile:
    """Build this rank's model and count its second step, when everything is allocated; a collective call."""
    plan, memory = plan_batches(config, context.world_size), LiveMemory()
    with Counters(memory) as counters:
        engine = TrainEngine(config, build_model_chunks(config), context, build_teacher(config))
        batch = synthetic_batch(config, context.device)
        # virtual stages need a micro-batch per stage; ZeRO-3 records the order of modules in the first micro-batch and
        # decides in the second what it keeps between uses
        needed = max(config.parallel.pipeline_model_parallel_size, 2 if zero_stage(config) == 3 else 1)
        few = min(plan.num_microbatches, needed)
        done, total = itertools.count(1), (few + plan.num_microbatches) * len(engine.scheduled)
        for chunk in engine.scheduled:
            chunk.register_forward_hook(lambda *_: passed(next(done), total) and None)
        engine.forward_backward([batch] * few, plan.tokens_per_step)
        engine.update()
        gc.collect()
        operations, traffic = OperationCounter(), CommunicationCounter()
        counters.counters += [operations, traffic]
        counted = step_memory(engine, [batch] * plan.num_microbatches, plan.tokens_per_step, memory)
        counters.counters = [memory]
        engine.close()
    return StepProfile(counted, comm_volumes(traffic), operations.total)


def synthetic_batch(config: Config, device: torch.device) -> Batch:
    """One micro-batch of ascending token ids, none of them masked."""
    shape = config.training.micro_batch_size, config.training.seq_length
    positions = torch.arange(shape[1], device=device).expand(shape).contiguous()
    tokens = positions % config.model.vocab_size
    mask = torch.ones(shape, device=device)
    return {"tokens": tokens, "labels": tokens, "position_ids": positions, "loss_mask": mask}


def step_memory(engine: TrainEngine, batches: list[Batch], tokens: int, memory: Any) -> Memory:
    """Train one step, and say what memory it takes, by a `LiveMemory` or what looks like one."""
    before = memory.current
    memory.reset_peak()
    with _activations_in_flight(engine, memory) as alive:
        results = engine.accumulate(batches, tokens)
    kept, peak, after = alive[0] - before, memory.peak, memory.current
    weights, optimizer, buffers = state_bytes(engine)
    memory.reset_peak()
    engine.reduce_gradients()
    reduction = memory.peak
    loss_totals(results, engine.context.device)
    memory.reset_peak()
    engine.update()
    return Memory(
        weights=weights,
        gradients=after - weights - optimizer - buffers,
        optimizer=optimizer,
        buffers=buffers,
        kept=kept,
        transient=peak - after - kept,
        reduction=max(reduction - after, 0),
        update=max(memory.peak - after, 0),
    )


@contextmanager
def _activations_in_flight(engine: TrainEngine, memory: Any) -> Iterator[list[int]]:
    """One entry: live bytes at the end of the last forward pass before the first backward pass.

    Under 1F1B and the interleaved schedule most micro-batches are in flight then.
    """
    alive, backward = [0], list[bool]()

    def forward(_module: Any, _arguments: Any, output: Tensor) -> None:
        if not backward:
            alive[0] = memory.current
            output.register_hook(lambda _: backward.append(True))

    hooks = [chunk.register_forward_hook(forward) for chunk in engine.scheduled]
    yield alive
    for hook in hooks:
        hook.remove()


def state_bytes(engine: TrainEngine) -> tuple[int, int, int]:
    """Bytes of weights, optimizer state and communication buffers."""
    weights, seen = engine.zero.weights(), set[int]()
    weights += [m.beta_fp32 for m in engine.deepspeed.module.modules() if getattr(m, "beta_fp32", None) is not None]
    weights += engine.distillation.weights if engine.distillation else []
    # Megatron-Core's column layers gather sequences in a global buffer
    buffers = [*parallel_state.get_global_memory_buffer().buffer.values(), *engine.zero.buffers()]
    return _bytes(weights, seen), _bytes(engine.zero.state(), seen), _bytes(buffers, seen)


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the storages of the tensors that are not in `seen`, which is updated."""
    storages = {id(s): s for tensor in tensors if id(s := tensor.untyped_storage()) not in seen}
    seen |= set(storages)
    return sum(storage.nbytes() for storage in storages.values())


def comm_volumes(counter: CommunicationCounter) -> list[CommVolume]:
    """The counted traffic by name of group; needs Megatron-Core's groups."""
    pp, found = parallel_state.get_pipeline_model_parallel_world_size(), defaultdict[tuple[str, str, int], Any](list)
    for (kind, ranks), traffic in counter.traffic.items():
        # Megatron-Core may send between stages through the group of all ranks
        group, size = (Peers.PIPELINE, pp) if kind == "send" else (_group_name(ranks), len(ranks))
        if kind != "recv_" and size > 1:  # the other side of a peer's `send`
            found[group, kind, size].append(traffic)
    return [
        CommVolume(kind, group, size, sum(t.bytes for t in same), sum(t.calls for t in same))
        for (group, kind, size), same in sorted(found.items())
    ]


def _group_name(ranks: tuple[int, ...]) -> str:
    """Name of the first of Megatron-Core's groups with these ranks."""
    groups = {
        Peers.TENSOR: parallel_state.get_tensor_model_parallel_group(),
        Peers.PIPELINE: parallel_state.get_pipeline_model_parallel_group(),
        Peers.DATA: parallel_state.get_data_parallel_group(),
        Peers.EMBEDDING: parallel_state.get_embedding_group(check_initialized=False),
        Peers.MODEL: parallel_state.get_model_parallel_group(),
        Peers.STAGE: parallel_state.get_tensor_and_data_parallel_group(),
        Peers.EXPERT: parallel_state.get_expert_model_parallel_group(),
        Peers.EXPERT_DATA: parallel_state.get_expert_data_parallel_group(),
    }
    members = {name: tuple(dist.get_process_group_ranks(group)) for name, group in groups.items() if group is not None}
    return next((name for name, group in members.items() if group == ranks), Peers.WORLD)
