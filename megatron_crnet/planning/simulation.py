"""Simulates one rank of a world in one process: the real model, schedule and optimizer on fake tensors.

PyTorch's `FakeTensorMode` tracks shapes without values, and its "fake" process group completes every collective at
once, so shapes, lifetimes and calls are real. A value read on the host (a loss, a norm) is 1, an integer or flag 0.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_crnet.config.batch import plan_batches
from megatron_crnet.config.deepspeed import offloads_optimizer, offloads_parameters
from megatron_crnet.config.phases import with_largest_ranks
from megatron_crnet.config.positions import METHODS, position_table
from megatron_crnet.config.schema import Config
from megatron_crnet.distributed.process_groups import initialize_parallel, shutdown_parallel
from megatron_crnet.planning.counted_step import Progress, count_step
from megatron_crnet.planning.even_experts import even_experts
from megatron_crnet.planning.profile import StepProfile
from megatron_crnet.utils.errors import require

LARGEST_WORLD = 4096


def simulate(config: Config, world_size: int, rank: int, passed: Progress = lambda *_: None) -> StepProfile:
    """Count a step of rank `rank` of `world_size`; of a run with a rank schedule, one with the largest ranks.

    The process must not be part of a world already.

    Raises:
        ConfigError: the world does not fit the configuration, or values that do not exist would decide something.
    """
    check_simulation(config, world_size, rank)
    config = with_largest_ranks(config)
    plan_batches(config, world_size)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        context = initialize_parallel(config)
        with context.heartbeat, _without_memory(), even_experts(position_table(config.model)):
            return count_step(config, context, passed)
    finally:
        shutdown_parallel()


def check_simulation(config: Config, world_size: int, rank: int) -> None:
    """Raise ConfigError for what cannot be simulated correctly."""
    require(
        1 <= world_size <= LARGEST_WORLD,
        f"--world-size is {world_size}, but worlds of 1 to {LARGEST_WORLD} ranks are simulated: give one of them",
    )
    require(
        0 <= rank < world_size,
        f"--rank is {rank}, but the ranks of a world of {world_size} are 0 to {world_size - 1}: give one of them",
    )
    require(
        not config.recompute.traits.inverts or not METHODS[config.model.variant].is_chained,
        f"recompute.strategy is {config.recompute.strategy}, but which layers it keeps follows from "
        "values, which a simulation does not have: use replay, or count with crnet measure-recompute",
    )
    require(
        not offloads_optimizer(config) and not offloads_parameters(config),
        "deepspeed.zero_optimization offloads to the host, but a simulation cannot tell host memory from the device's: "
        "leave the offload out",
    )


@contextmanager
def _without_memory() -> Iterator[None]:
    """Fake tensors, and patches where libraries need more than shapes."""
    coordinator = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    with (
        # PyTorch refuses to move a fake parameter under a counter; the model is on its device already
        patch.object(nn.Module, "to", lambda module, *_, **__: module),
        # ZeRO-3 compares the order of its parameters with rank 0
        patch.object(coordinator, "assert_ints_same_as_other_ranks", lambda _: None),
        patch.dict(os.environ, {"LOCAL_RANK": "0"}),
        FakeTensorMode(allow_non_fake_inputs=True),
        _Lists(),
        _Scalars(),
    ):
        yield


class _Scalars(TorchDispatchMode):
    """Answers reads of scalars, and quickly those of devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].device
        if func is torch.ops.aten._local_scalar_dense.default:
            return _value(args[0].dtype)
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """Answers `tolist`, which is not an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            return [_value(args[0].dtype)] * args[0].numel()
        return func(*args, **(kwargs or {}))


def _value(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return 1.0
    return False if dtype == torch.bool else 0
