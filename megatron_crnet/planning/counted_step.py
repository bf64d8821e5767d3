"""One training step of this rank, counted while it happens: bytes alive, collective calls, operations.

The same code counts real ranks and simulated ones (`planning/simulation.py`); what it counts stands beside the
formulas of `estimate.py`. It watches every operation of PyTorch, so a counted step is slow.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_crnet.config.batch import BatchPlan, plan_batches
from megatron_crnet.config.deepspeed_rules import zero_stage
from megatron_crnet.config.schema import Config
from megatron_crnet.distributed.process_groups import ParallelContext
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.engine.schedule import Batch, loss_totals
from megatron_crnet.engine.zero import Masters
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.planning.communication import CommunicationCounter
from megatron_crnet.planning.figures import (
    DATA,
    MODEL,
    PIPELINE,
    STAGE,
    TENSOR,
    WORLD,
    Flow,
    Memory,
    StepFigures,
    merged,
)
from megatron_crnet.planning.live_memory import LiveMemory
from megatron_crnet.planning.recompute_report import flop_counter


class OperationCounter(TorchDispatchMode):
    """Counts what PyTorch's `FlopCounterMode` counts, without keeping alive what passes through modules."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas = flop_counter().flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.observe(func, args, kwargs, out)
        return out

    def observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count an operation that PyTorch has a formula for."""
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)


class _Observers(TorchDispatchMode):
    """Several counters behind one mode: each mode of its own would cost every operation a turn in Python."""

    def __init__(self, *counters: LiveMemory | OperationCounter | CommunicationCounter) -> None:
        super().__init__()
        self.counters = list(counters)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.prim.device.default:  # half of what a simulation dispatches, and does nothing
            for counter in self.counters:
                counter.observe(func, args, kwargs, out)
        return out


def ignore(_done: int, _total: int) -> None:
    """What is told of passes where nobody waits."""


def count_step(config: Config, context: ParallelContext, passed: Callable[[int, int], object] = ignore) -> StepFigures:
    """Build this rank's model, count its second step, which finds everything allocated; a collective call.

    Args:
        passed: told after each forward pass of a micro-batch how many there have been and how many there will be.
    """
    plan = plan_batches(config, context.world_size)
    memory = LiveMemory()
    with _Observers(memory) as observers:
        engine = TrainEngine(config, build_model_chunks(config), context)
        batch = _batch(plan, config.model.vocab_size, context.device)
        # virtual stages need as many micro-batches as there are stages; ZeRO-3 learns the order of its modules in the
        # first and decides in the second what it will keep between their uses
        needed = max(config.parallel.pipeline_model_parallel_size, 2 if zero_stage(config) == 3 else 1)
        few = min(plan.num_microbatches, needed)
        _tell(engine, (few + plan.num_microbatches) * len(engine.scheduled), passed)
        engine.forward_backward([batch] * few, plan.tokens_per_step)
        engine.update()
        gc.collect()
        figures = _counted(engine, [batch] * plan.num_microbatches, plan.tokens_per_step, memory, observers)
        engine.deepspeed.destroy()
    return figures


def _tell(engine: TrainEngine, total: int, passed: Callable[[int, int], object]) -> None:
    done = itertools.count(1)
    for chunk in engine.scheduled:
        chunk.register_forward_hook(lambda *_: passed(next(done), total) and None)


def _batch(plan: BatchPlan, vocab_size: int, device: torch.device) -> Batch:
    shape = plan.micro_batch_size, plan.seq_length
    positions = torch.arange(plan.seq_length, device=device).expand(shape).contiguous()
    tokens = positions % vocab_size
    return {
        "tokens": tokens,
        "labels": tokens,
        "position_ids": positions,
        "loss_mask": torch.ones(shape, device=device),
    }


def _counted(
    engine: TrainEngine, batches: list[Batch], tokens: int, memory: LiveMemory, observers: _Observers
) -> StepFigures:
    before, passes = memory.current, _Passes(engine, memory)
    operations, traffic = OperationCounter(), CommunicationCounter()
    observers.counters += [operations, traffic]
    memory.reset_peak()
    results = engine.accumulate(batches, tokens)
    peak, after = memory.peak, memory.current
    weights, optimizer, buffers = state_bytes(engine)
    memory.reset_peak()
    engine.reduce_gradients()
    reduction = memory.peak
    loss_totals(results, engine.context.device)
    memory.reset_peak()
    engine.update()
    update = memory.peak
    observers.counters = [memory]
    passes.close()
    kept = passes.kept - before
    counted = Memory(
        weights=weights,
        gradients=after - weights - optimizer - buffers,
        optimizer=optimizer,
        buffers=buffers,
        kept=kept,
        transient=peak - after - kept,
        reduction=max(reduction - after, 0),
        update=max(update - after, 0),
    )
    return StepFigures(counted, list(flows(traffic)), operations.total)


class _Passes:
    """Notes what is alive when the last forward pass before the first backward pass ends: the most that is kept.

    Under 1F1B and the interleaved schedule no more micro-batches than then are ever in flight.
    """

    def __init__(self, engine: TrainEngine, memory: LiveMemory) -> None:
        self.memory, self.kept, self._ended = memory, 0, False
        self._hooks = [chunk.register_forward_hook(self._passed) for chunk in engine.scheduled]

    def _passed(self, _module: Any, _arguments: Any, output: Tensor) -> None:
        if not self._ended:
            self.kept = self.memory.current
            output.register_hook(self._backward)

    def _backward(self, _gradient: Tensor) -> None:
        self._ended = True

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def state_bytes(engine: TrainEngine) -> tuple[int, int, int]:
    """Bytes of weights, of the optimizer's state and of DeepSpeed's communication buffers."""
    parameters = list(engine.deepspeed.module.parameters())
    weights = [x for p in parameters for x in (p.data, getattr(p, "ds_tensor", None)) if x is not None]
    weights += [m.beta_fp32 for m in engine.deepspeed.module.modules() if getattr(m, "beta_fp32", None) is not None]
    adam = Masters(engine.deepspeed, engine.stage).adam
    moments = [x for state in adam.state.values() for x in state.values() if isinstance(x, Tensor)]
    masters = [p.data for group in adam.param_groups for p in group["params"]]
    masters += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])  # ZeRO-3 shows Adam one at a time
    seen: set[int] = set()
    return tuple(_bytes(tensors, seen) for tensors in (weights, [*masters, *moments], _buffers(engine.optimizer)))  # type: ignore[return-value]


def _buffers(optimizer: Any) -> Iterator[Tensor]:
    # where Megatron-Core's column layers gather a sequence
    yield from parallel_state.get_global_memory_buffer().buffer.values()
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        buffer = bucket.buffer
        yield from [buffer] if isinstance(buffer, Tensor) else [x for x in buffer or () if isinstance(x, Tensor)]


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the storages behind the tensors, each once, without those in `seen`, which grows."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if id(storage) not in seen:
            seen.add(id(storage))
            total += storage.nbytes()
    return total


def flows(counter: CommunicationCounter) -> list[Flow]:
    """What a counter has seen, by the groups' names; needs Megatron-Core's groups."""
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    return merged(
        # Megatron-Core may send between two stages through the group of all ranks
        Flow("send", PIPELINE, pp, traffic.calls, traffic.bytes)
        if kind == "send"
        else Flow(kind, _group_name(ranks), len(ranks), traffic.calls, traffic.bytes)
        for (kind, ranks), traffic in counter.traffic.items()
        if kind != "recv_"  # the other side of somebody's `send`
    )


def _group_name(ranks: tuple[int, ...]) -> str:
    """Name of the smallest of Megatron-Core's groups with these ranks; groups may be the same ranks."""
    groups = {
        TENSOR: parallel_state.get_tensor_model_parallel_group(),
        PIPELINE: parallel_state.get_pipeline_model_parallel_group(),
        DATA: parallel_state.get_data_parallel_group(),
        MODEL: parallel_state.get_model_parallel_group(),
        STAGE: parallel_state.get_tensor_and_data_parallel_group(),
    }
    same = [name for name, group in groups.items() if tuple(dist.get_process_group_ranks(group)) == ranks]
    return same[0] if same else WORLD
