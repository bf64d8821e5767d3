"""Process groups: one process or many, Megatron-Core's groups, and the interface to them that DeepSpeed needs."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import nn
from torch.distributed import distributed_c10d

from megatron_crnet.config.batch import data_parallel_size
from megatron_crnet.config.schema import Config
from megatron_crnet.distributed import cpu_backend
from megatron_crnet.distributed.consensus import agree_on_configuration
from megatron_crnet.distributed.launcher import Launch, keep_launch_order, read_launch
from megatron_crnet.distributed.rendezvous import meet
from megatron_crnet.distributed.watchdog import MARGIN_SECONDS, Heartbeat, report_lost_ranks
from megatron_crnet.utils.errors import CrnetError, PeerLostError, require


@dataclass(frozen=True)
class ParallelContext:
    """This process among all.

    Attributes:
        rank, world_size: among all processes.
        dp_rank, dp_size: among the replicas of this part of the model.
        device: where this rank computes.
        heartbeat: tells the other ranks what this one is doing.
    """

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    device: torch.device
    heartbeat: Heartbeat

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0


def initialize_parallel(config: Config) -> ParallelContext:
    """Join the other processes and build Megatron-Core's groups; seeds Megatron's random trackers.

    Raises:
        ConfigError: ranks have different configurations, or their number does not fit.
        PeerLostError: another rank died or did not arrive.
    """
    device, heartbeat = join_processes(config)
    parallel = config.parallel
    vpp = parallel.virtual_pipeline_model_parallel_size
    with report_lost_ranks(heartbeat, parallel.distributed_timeout_minutes):
        data_parallel_size(config, dist.get_world_size())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=vpp if vpp and vpp > 1 else None,
            # experts are not cut; Megatron-Core's default is the tensor-parallel size
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=1 if config.model.num_experts else None,
            distributed_timeout_minutes=collective_timeout(config) / timedelta(minutes=1),
            create_gloo_process_groups=False,  # second groups on the host, which nothing here uses
        )
    seed_random_states(config.training.seed)
    return ParallelContext(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        device=device,
        heartbeat=heartbeat,
    )


def seed_random_states(seed: int) -> None:
    """Seed dropout: the same on tensor-parallel ranks (Megatron's tracker tells shards apart), else its own."""
    pp, dp = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    own = (seed + 100 * pp + 100003 * dp) % 2**31
    torch.manual_seed(own)
    tensor_parallel.model_parallel_cuda_manual_seed(own)


def join_processes(config: Config) -> tuple[torch.device, Heartbeat]:
    """Meet the other processes that the launcher started, and agree on the configuration.

    Returns:
        This rank's device, and its heartbeat, which the caller closes.

    Raises:
        ConfigError: ranks have different configurations.
        PeerLostError: another rank died or did not arrive.
    """
    keep_launch_order(config.parallel.tensor_model_parallel_size)
    cpu_backend.install()
    if dist.is_initialized():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = _take_device(Launch(local_rank=local_rank), chosen=True)
        _export(local_rank_variables(local_rank, device))
        agree_on_configuration(config)
        # there is no store of ours in groups of the caller, whose business lost ranks are there
        return device, Heartbeat(dist.HashStore(), rank=0, world_size=1)
    launch = read_launch()
    device = _take_device(launch)
    _export({**launch.variables(), **local_rank_variables(launch.local_rank or 0, device)})
    return device, _join(config, launch)


def all_groups() -> list[dist.ProcessGroup]:
    """Every process group that this process is in, oldest first; PyTorch has no public list."""
    return list(distributed_c10d._world.pg_map)


def can_leave_groups(error: Exception) -> bool:
    """Whether this rank can leave its process groups after an error without waiting for ranks that do not come.

    NCCL's groups are left by all ranks together, and a compiler or a full disk may fail on this rank alone. Gloo's are
    left by each rank, which a peer in the middle of a call would take for a lost one: so after an error of this project
    alone, which all ranks share.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    return dist.get_backend() != "nccl" and isinstance(error, CrnetError) and not isinstance(error, PeerLostError)


def shutdown_parallel(keep: Collection[dist.ProcessGroup] = ()) -> None:
    """Leave the groups and put the environment back; safe after an error on this rank alone.

    Args:
        keep: groups of the caller, with the default one among them; all others are left.
    """
    parallel_state.destroy_model_parallel()
    if keep:
        import deepspeed  # takes a second, and is there already where these groups were made

        for group in (group for group in all_groups() if group not in keep):
            deepspeed.comm.destroy_process_group(group)  # which forgets DeepSpeed's references as well
    elif dist.is_initialized():
        dist.destroy_process_group()
    while _exported:
        name, before = _exported.popitem()
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


_exported: dict[str, str | None] = {}
"""Variables that `join_processes` has set, with their values before. Left behind, LOCAL_RANK alone would make other
libraries of a process that goes on (Accelerate) look for the other ranks."""


def _export(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        _exported.setdefault(name, os.environ.get(name))
        os.environ[name] = value


def local_rank_variables(local_rank: int, device: torch.device) -> dict[str, str]:
    """The variables by which DeepSpeed takes its device: the index of ours, also where this process sees no other."""
    index = str(local_rank if device.index is None else device.index)
    of_mpirun = "OMPI_COMM_WORLD_LOCAL_RANK"  # DeepSpeed insists that both are equal
    return {"LOCAL_RANK": index, **({of_mpirun: index} if of_mpirun in os.environ else {})}


def _take_device(launch: Launch, chosen: bool = False) -> torch.device:
    """Set the device of this rank.

    Args:
        chosen: the current one is the caller's choice, unless it is the first, where nobody may have chosen.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    current = torch.cuda.current_device() if chosen else 0
    device = torch.device("cuda", current or device_index(launch, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def device_index(launch: Launch, devices: int) -> int:
    """Index of this process's GPU among those that it sees.

    Raises:
        ConfigError: there is none, or LOCAL_RANK is not set.
    """
    index = launch.local_rank or 0
    if launch.binds_devices and devices == 1:
        return 0  # srun --gpus-per-task shows each process its own
    require(
        launch.local_rank is not None or launch.world_size == 1 or devices == 1,
        f"LOCAL_RANK is not set, so nothing says which of {devices} GPUs rank {launch.rank} may use: set it to the "
        "number of the process on its node, or start the processes with crnet launch",
    )
    require(
        index < devices,
        f"LOCAL_RANK is {index}, but this process sees {devices} GPUs: start as many processes on each node as it has "
        "GPUs, or look at CUDA_VISIBLE_DEVICES",
    )
    return index


def _join(config: Config, launch: Launch) -> Heartbeat:
    limit = config.parallel.distributed_timeout_minutes
    # else every gloo group opens a socket to every rank, though its calls need a few neighbours
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    store = meet(launch, limit)
    # a connection of its own: a collective call that waits holds the other one
    own = store.clone()  # type: ignore[attr-defined]  # missing in the stubs
    heartbeat = Heartbeat(own, launch.rank, launch.world_size)
    with report_lost_ranks(heartbeat, limit):
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore("groups", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=collective_timeout(config),
        )
        agree_on_configuration(config)
    return heartbeat


def collective_timeout(config: Config) -> timedelta:
    """Timeout of collective calls; on NCCL, which ends the process without naming ranks, after the watchdog's."""
    limit = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    return limit + timedelta(seconds=2 * MARGIN_SECONDS) if torch.cuda.is_available() else limit


def replica_group(parameter: nn.Parameter) -> dist.ProcessGroup:
    """The ranks that hold the same shard of a parameter, among which ZeRO may divide its optimizer state.

    Experts that are spread over replicas are marked `allreduce = False`, and have fewer copies than other weights.
    """
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_group()
    return parallel_state.get_expert_data_parallel_group()


class MegatronMpu:
    """Megatron-Core's groups under the names that DeepSpeed asks an `mpu` for."""

    def __getattr__(self, name: str) -> Any:
        # DeepSpeed's "model parallel" group is tensor x pipeline; its other names are Megatron's own
        return getattr(parallel_state, name)

    def get_model_parallel_rank(self) -> int:
        """Rank in the tensor x pipeline group."""
        return dist.get_rank(parallel_state.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        """Size of the tensor x pipeline group."""
        return dist.get_world_size(parallel_state.get_model_parallel_group())


class NormMpu(MegatronMpu):
    """For `deepspeed.runtime.utils.clip_grad_norm_`, which counts replicated parameters only where this rank is 0.

    That must be the tensor-parallel rank: pipeline stages hold different parameters.
    """

    def get_model_parallel_rank(self) -> int:
        """Rank among the ranks that may hold copies of the same parameters."""
        return int(parallel_state.get_tensor_model_parallel_rank())
