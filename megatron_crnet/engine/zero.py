"""DeepSpeed's private buffers, which zero_state.py and this module alone read: one small class per ZeRO stage.

fp32 master weights and Adam's moments: a ZeRO stage flattens parameters into buffers, cuts these over data-parallel
ranks, and may move them to the host. Here each parameter knows its shard of that, so that it can be read and written
whole and no checkpoint depends on stage, layout or settings of DeepSpeed's buffers.

Gradients: who reduces and divides them, and where they lie after the last backward pass, also depends on the stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from inspect import getclosurevars
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero import register_external_parameter
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_grad
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_crnet.engine.optimizer import is_partial
from megatron_crnet.engine.param_shard import Placement, equal_parts, overlap
from megatron_crnet.engine.zero_state import ZeroState
from megatron_crnet.model.glue import accumulate_
from megatron_crnet.model.weights import Weight

NORM_PART = 2**26
"""Elements whose norm is one sum: more would round worse on CPUs, and take 64-bit indices on GPUs."""

RELEASABLE = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
"""A decorated function that has a cache."""
MOST_COMPILED = 32
"""Sizes of parameters for which the sum of gradients is compiled, each by itself; more take PyTorch's operation."""


def release(engine: DeepSpeedEngine) -> None:
    """Take DeepSpeed's hooks off the weights, and the model off ZeRO-3's list of modules and out of the cache of what a
    module may release, which is one for all engines: all of them would keep it in memory."""
    try:
        engine.destroy()
    finally:
        FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not engine.module]
        getclosurevars(RELEASABLE).nonlocals["func"].cache_clear()


def local_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of this rank's parameter, which ZeRO-3 empties."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def held_partition(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter under ZeRO-3."""
    return parameter.ds_tensor  # type: ignore[attr-defined]


class Stage0(ZeroState):
    """DeepSpeed partitions nothing; in bf16 it keeps fp32 copies."""

    @property
    def adam(self) -> torch.optim.Optimizer:
        """The optimizer inside of DeepSpeed's."""
        return self.engine.basic_optimizer if self.stage == 0 else self.optimizer.optimizer

    def local_shape(self, parameter: nn.Parameter) -> torch.Size:
        """See the base."""
        return local_shape(parameter)

    def poison_gradients(self) -> None:
        """Make all gradients NaN, so that DeepSpeed drops them."""
        for parameter in (p for p in self.engine.module.parameters() if p.requires_grad):
            if parameter.grad is not None:
                parameter.grad.fill_(math.nan)
            else:
                # ZeRO-3 cuts equal parts for all ranks; what the last one has beyond the parameter must stay 0
                value = torch.full((local_shape(parameter).numel(),), math.nan, device=self.device)
                safe_set_full_grad(parameter, F.pad(value, (0, parallel_state.get_data_parallel_world_size())))

    def placement(self, parameter: nn.Parameter) -> Placement:
        """Where the replicas keep a parameter's fp32 master."""
        master, start = self._fp32_copies.get(parameter, (parameter, 0))
        return Placement(master, start, [(0, parameter.numel())])

    @cached_property
    def _fp32_copies(self) -> dict[nn.Parameter, tuple[Tensor, int]]:
        """In bf16: one for each parameter, or with Apex one for each group, in which it has a start."""
        low, found = getattr(self.optimizer, "fp16_groups", []), {}
        if hasattr(self.optimizer, "fp32_groups_flat"):
            for parameters, flat in zip(low, self.optimizer.fp32_groups_flat, strict=True):
                start = 0
                for parameter in parameters:
                    found[parameter] = flat, start
                    start += parameter.numel()
        elif hasattr(self.optimizer, "fp32_groups"):
            for parameters, masters in zip(low, self.optimizer.fp32_groups, strict=True):
                for parameter, master in zip(parameters, masters, strict=True):
                    found[parameter] = master, 0
        return found

    def buffers(self) -> Iterator[Tensor]:
        """Every buffer in which gradients are reduced."""
        for bucket in getattr(self.optimizer, "ipg_buckets", {}).values():
            buffer = bucket.buffer
            yield from [buffer] if isinstance(buffer, Tensor) else [x for x in buffer or () if isinstance(x, Tensor)]


class Stage1(Stage0):
    """Optimizer state is partitioned; plain autograd accumulates, and everything is reduced once."""

    stage = 1
    reduces_in_place = False

    def forget_first_step(self) -> None:
        """DeepSpeed takes none."""

    def reduce_gradients(self) -> None:
        """In fp32 as after a pipeline's schedule; in bf16, where the optimizer is offloaded, by the engine.

        In bf16 the former would allocate an fp32 bucket more.
        """
        if self.optimizer.dtype == torch.float32:
            self.optimizer.reduce_gradients(pipeline_parallel=True)
        else:
            self.engine.allreduce_gradients()

    def placement(self, parameter: nn.Parameter) -> Placement:
        """From where it lies in its flattened group, of which every rank has an equal part."""
        group, first = self._positions[parameter]
        master = self._masters[group]
        size = master.numel()
        shards = [overlap(first, parameter.numel(), d * size, size) for d in range(self._replicas(parameter))]
        return Placement(master, max(first - self._replica(parameter) * size, 0), shards)

    @cached_property
    def _positions(self) -> dict[nn.Parameter, tuple[int, int]]:
        """Of each parameter the number of its group, and where it begins in that."""
        grouped = zip(*self._groups_and_offsets, strict=True)
        return {p: (i, start) for i, pair in enumerate(grouped) for p, start in zip(*pair, strict=False)}

    @property
    def _groups_and_offsets(self) -> tuple[list[list[nn.Parameter]], list[list[int]]]:
        return self.optimizer.round_robin_bit16_groups, self.optimizer.round_robin_bit16_offsets

    @property
    def _masters(self) -> list[Tensor]:
        """This rank's master weights, a flat tensor per parameter group."""
        return self.optimizer.single_partition_of_fp32_groups


class Stage1BF16(Stage1):
    """DeepSpeed's `BF16_Optimizer`, which keeps gradients in fp32.

    Its own hooks would cast each gradient to fp32 before they add it, a pass over memory more; so here are others.
    """

    reduces_in_place = True

    def prepare(
        self, projected: Sequence[Weight], progress: Callable[[], None], add_: Callable[[Tensor, Tensor], None]
    ) -> None:
        """See the base; from now on every gradient is added to the one in fp32 as soon as it is there, and dropped."""
        super().prepare(projected, progress, add_)

        def accumulate(total: Tensor, parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            add_(total, parameter.grad.view(-1))
            parameter.grad = None

        if len({total.numel() for total in self._fp32_gradients.values()}) > MOST_COMPILED:
            add_ = accumulate_
        # where DeepSpeed looks for hooks to take off
        self.optimizer._grad_acc_hooks += [
            parameter.register_post_accumulate_grad_hook(partial(accumulate, total))
            for parameter, total in self._fp32_gradients.items()
        ]
        if parallel_state.get_model_parallel_group().size() == 1:
            self.optimizer.get_grads_for_norm = self._norm_parts

    def _norm_parts(self, for_clipping: bool = False) -> Any:
        """In place of DeepSpeed's, where no rank has to leave out copies: few large tensors, not one per parameter."""
        everywhere: list[Tensor] = []
        by_group: dict[str, list[Tensor]] = {}
        pairs = zip(self.adam.param_groups, self.optimizer.fp32_groups_actual_gradients_flat, strict=True)
        for settings, flat in pairs:
            is_spread = settings.get("moe", False) and not for_clipping
            found = by_group.setdefault(settings["name"], []) if is_spread else everywhere
            found += flat.split(NORM_PART)
        return everywhere if for_clipping else (everywhere, by_group)

    def reduce_gradients(self) -> None:
        """By the engine; a single replica has nothing to add."""
        has_gradients = [[True] * len(group) for group in self.optimizer.bf16_groups]
        self.optimizer.fp32_groups_has_gradients = has_gradients
        if parallel_state.get_data_parallel_world_size() > 1:
            # each group's flat buffer in place; in buckets, DeepSpeed would copy them all together and back
            self.engine.allreduce_gradients(bucket_size=0)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The one in fp32."""
        return self._fp32_gradients.get(parameter)

    @cached_property
    def _fp32_gradients(self) -> dict[nn.Parameter, Tensor]:
        both = zip(self.optimizer.bf16_groups, self.optimizer.fp32_groups_gradients, strict=True)
        return {p: gradient for pair in both for p, gradient in zip(*pair, strict=True)}

    def poison_gradients(self) -> None:
        """DeepSpeed's setter fails for a parameter that is cut between ranks under this optimizer."""
        for gradient in (gradient for group in self.optimizer.fp32_groups_gradients for gradient in group):
            gradient.fill_(math.nan)

    @property
    def _groups_and_offsets(self) -> tuple[list[list[nn.Parameter]], list[list[int]]]:
        groups = self.optimizer.bf16_groups
        return groups, [list(accumulate((p.numel() for p in group), initial=0)) for group in groups]

    @property
    def _masters(self) -> list[Tensor]:
        return self.optimizer.fp32_groups_flat_partition


class Stage2(Stage1):
    """Gradients are partitioned, too: DeepSpeed's hooks reduce them during every backward pass.

    Equal partitions lie on the same data-parallel rank of each tensor-parallel rank, so partial gradients can be
    summed as they are.
    """

    stage = 2

    def reduce_gradients(self) -> None:
        """The hooks have."""

    def partial_gradients(self) -> list[Tensor]:
        """From groups of parameters with partial gradients (`optimizer.parameter_groups`)."""
        partial = [i for i, parameters in enumerate(self._groups) if is_partial(parameters[0])]
        return [gradient for i in partial for gradient in self.optimizer.averaged_gradients[i]]

    @property
    def _groups(self) -> list[list[nn.Parameter]]:
        return self.optimizer.bit16_groups


class Stage3(Stage2):
    """Parameters are partitioned, too."""

    stage = 3

    def prepare(
        self, projected: Sequence[Weight], progress: Callable[[], None], add_: Callable[[Tensor, Tensor], None]
    ) -> None:
        """See the base; and say which weights a module reads of others, as all passes must gather them alike.

        DeepSpeed notes by itself those that are not there when they are read. After the passes that it has traced that
        is a tracing error.
        """
        super().prepare(projected, progress, add_)
        for module in self.engine.module.modules():
            for parameter in getattr(module, "parameters_read", ()):
                register_external_parameter(module, parameter)

    @property
    def _groups(self) -> list[list[nn.Parameter]]:
        """By sub-group, a piece of a group of at most sub_group_size elements."""
        return self.optimizer.fp16_groups

    def exact(self, parameter: nn.Parameter) -> Tensor:
        """From the master: the parameter itself may be rounded to bf16."""
        return safe_get_full_fp32_param(parameter)

    def _held(self, parameter: nn.Parameter, offset: int) -> tuple[Tensor, int]:
        """See the base."""
        return held_partition(parameter), 0

    def placement(self, parameter: nn.Parameter) -> Placement:
        """From equal parts of the parameter itself, of which the last is padded."""
        group, start, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        parts = equal_parts(local_shape(parameter).numel(), self._replicas(parameter))
        return Placement(self._masters[group], start, parts)

    @property
    def _masters(self) -> list[Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def begin(self) -> None:
        """Prepare for `write`; see the base."""
        super().begin()
        self.optimizer.checkpoint_event_prologue()

    def _write_parameter(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """`finish` does, for all."""

    def finish(self, steps: int) -> None:
        """Complete what `write` has begun; see the base."""
        super().finish(steps)
        for index in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        for parameter, shard in self.shards.items():
            if shard is not None and not parameter.requires_grad:
                held_partition(parameter).view(-1)[: shard.numel].copy_(shard.read(shard.master))
        self.optimizer.checkpoint_event_epilogue()

    def weights(self) -> list[Tensor]:
        """With the partitions."""
        return [x for p in self.engine.module.parameters() for x in (p.data, held_partition(p))]

    def state(self) -> list[Tensor]:
        """With the masters: this stage shows Adam one at a time."""
        return super().state() + self._masters


def zero_state(engine: DeepSpeedEngine, stage: int) -> ZeroState:
    """The class of an engine of this ZeRO stage."""
    if stage == 1 and hasattr(engine.optimizer, "fp32_groups_gradients"):
        return Stage1BF16(engine)
    return (Stage0, Stage1, Stage2, Stage3)[stage](engine)
