"""fp32 master weights and Adam's moments of whole parameters, wherever DeepSpeed keeps them.

A ZeRO stage flattens parameters into buffers, cuts these over data-parallel ranks, and may move them to the host.
Here each parameter knows its slice of that, so that it can be read and written whole and no checkpoint depends on
stage, layout or settings of DeepSpeed's buffers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_crnet.engine.state_kinds import MASTER
from megatron_crnet.utils.errors import CheckpointError


@dataclass(frozen=True)
class MasterSlice:
    """Elements [offset, offset + numel) of a flattened parameter: elements [start, start + numel) of a master.

    Attributes:
        master: an fp32 tensor that the optimizer updates; the moments in its state have the same shape.
    """

    master: Tensor
    start: int
    offset: int
    numel: int

    def part(self, tensor: Tensor) -> Tensor:
        """This slice of the master or of one of its moments; a view."""
        return tensor.detach().view(-1).narrow(0, self.start, self.numel)

    def cut(self, whole: Tensor) -> Tensor:
        """This slice of the whole parameter's values."""
        return whole.view(-1).narrow(0, self.offset, self.numel)


def local_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of this rank's parameter, which ZeRO-3 empties."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


class Masters:
    """The masters and moments of one DeepSpeed engine.

    Args:
        stage: its ZeRO stage.
    """

    def __init__(self, engine: DeepSpeedEngine, stage: int) -> None:
        self.optimizer, self.device, self.stage = engine.optimizer, engine.device, stage
        self.adam: torch.optim.Optimizer = engine.basic_optimizer if stage == 0 else engine.optimizer.optimizer
        self.slices = dict(self._slices(engine.module))
        self._places: dict[nn.Parameter, list[tuple[int, int] | None]] | None = None
        self.swaps = bool(getattr(self.optimizer, "swap_optimizer", False))
        """State lives on NVMe; DeepSpeed alone can read it."""

    def _slices(self, module: nn.Module) -> Iterator[tuple[nn.Parameter, MasterSlice | None]]:
        if self.stage == 0:
            replaced = dict(self._replaced())
            for parameter in module.parameters():
                yield parameter, replaced.get(parameter, MasterSlice(parameter, 0, 0, parameter.numel()))
            return
        for parameter in module.parameters():
            yield parameter, self._partition(parameter) if self.stage == 3 else self._fragment(parameter)

    def _replaced(self) -> Iterator[tuple[nn.Parameter, MasterSlice]]:
        """Stage 0 in bf16 has fp32 copies: one for each parameter, or with Apex one for each group."""
        low = getattr(self.optimizer, "fp16_groups", [])
        if hasattr(self.optimizer, "fp32_groups_flat"):
            for parameters, flat in zip(low, self.optimizer.fp32_groups_flat, strict=True):
                start = 0
                for parameter in parameters:
                    yield parameter, MasterSlice(flat, start, 0, parameter.numel())
                    start += parameter.numel()
        elif hasattr(self.optimizer, "fp32_groups"):
            for parameters, masters in zip(low, self.optimizer.fp32_groups, strict=True):
                for parameter, master in zip(parameters, masters, strict=True):
                    yield parameter, MasterSlice(master, 0, 0, parameter.numel())

    def _fragment(self, parameter: nn.Parameter) -> MasterSlice | None:
        found = parameter._hp_mapping  # type: ignore[attr-defined]
        if found is None:
            return None
        groups = getattr(self.optimizer, "fp32_groups_flat_partition", None)  # in bf16 at stage 1
        if groups is None:
            groups = self.optimizer.single_partition_of_fp32_groups
        here, there = found.hp_fragment_address, found.lp_fragment_address
        return MasterSlice(groups[found.param_group_index], here.start, there.start, here.numel)

    def _partition(self, parameter: nn.Parameter) -> MasterSlice | None:
        group, start, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        offset = size * dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
        numel = min(size, parameter.ds_numel - offset)  # type: ignore[attr-defined]  # the last partition is padded
        master = self.optimizer.fp32_partitioned_groups_flat[group]
        return MasterSlice(master, start, offset, numel) if numel > 0 else None

    def read(self, parameter: nn.Parameter, kind: str, owners: Collection[int] | None = None) -> Tensor | None:
        """The whole fp32 master or moment, of the parameter's local shape; a collective call over replicas.

        Each replica sends its slice to those that are to have the whole, and nothing else travels.

        Args:
            owners: data-parallel ranks that get it; the others get None. All of them by default.
        """
        if self.swaps:
            return self.optimizer.get_full_hp_param(parameter, None if kind == MASTER else kind).float()
        found, rank = self.slices[parameter], parallel_state.get_data_parallel_rank()
        mine = None if found is None else found.part(self._tensor(found.master, kind)).to(self.device)
        whole = None
        if owners is None or rank in owners:
            whole = torch.zeros(local_shape(parameter).numel(), device=self.device)
            if found is not None and mine is not None:
                found.cut(whole).copy_(mine)
        if self.stage > 0:
            self._exchange(parameter, mine, whole, owners)
        return None if whole is None else whole.view(local_shape(parameter))

    def _exchange(
        self, parameter: nn.Parameter, mine: Tensor | None, whole: Tensor | None, owners: Collection[int] | None
    ) -> None:
        """Send this replica's slice to the owners, and receive the others' where this is one."""
        group = parallel_state.get_data_parallel_group()
        rank, places = dist.get_rank(group), self._places_of_replicas()[parameter]
        peers = [other for other in range(len(places)) if other != rank]
        calls = [
            dist.P2POp(dist.isend, mine, dist.get_global_rank(group, other), group)
            for other in peers
            if mine is not None and (owners is None or other in owners)
        ]
        if whole is not None:
            parts = [(other, place) for other in peers if (place := places[other]) is not None]
            calls += [
                dist.P2POp(dist.irecv, whole.narrow(0, *place), dist.get_global_rank(group, other), group)
                for other, place in parts
            ]
        for call in dist.batch_isend_irecv(calls) if calls else []:
            call.wait()

    def _places_of_replicas(self) -> dict[nn.Parameter, list[tuple[int, int] | None]]:
        """Offset and size of each replica's slice of each parameter; the first time a collective call over replicas."""
        if self._places is None:
            mine = [None if found is None else (found.offset, found.numel) for found in self.slices.values()]
            group = parallel_state.get_data_parallel_group()
            everyone: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(everyone, mine, group=group)
            self._places = {parameter: list(places) for parameter, *places in zip(self.slices, *everyone, strict=True)}
        return self._places

    def write(self, parameter: nn.Parameter, values: Mapping[str, Tensor]) -> None:
        """Set master and moments from whole values; the parameter itself follows, under ZeRO-3 with `finish`."""
        found = self.slices[parameter]
        if found is not None:
            for kind, whole in values.items():
                found.part(self._tensor(found.master, kind)).copy_(found.cut(whole))
        if self.stage < 3:
            parameter.detach().copy_(values[MASTER])

    def _tensor(self, master: Tensor, kind: str) -> Tensor:
        if kind == MASTER:
            return master
        state = self.adam.state[master]
        if kind not in state:  # before the first step
            state[kind] = torch.zeros_like(master, requires_grad=False)
        return state[kind]

    @property
    def steps(self) -> int:
        """How often Adam has updated, for its bias correction."""
        counts = [state["step"] for state in self.adam.state.values() if "step" in state]
        counts += [group["step"] for group in self.adam.param_groups if "step" in group]  # Apex
        return int(counts[0]) if counts else 0

    def begin(self) -> None:
        """Prepare for `write`; a collective call.

        Raises:
            CheckpointError: DeepSpeed keeps the state on NVMe, where it cannot be put.
        """
        if self.swaps:
            raise CheckpointError(
                "offload_optimizer.device is nvme, into which no checkpoint can be loaded: resume with device cpu"
            )
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()

    def finish(self, steps: int) -> None:
        """Complete what `write` has begun; a collective call.

        Args:
            steps: as `steps` was when the values were read.
        """
        if type(self.adam).__name__ == "FusedAdam":  # Apex counts by group
            for group in self.adam.param_groups:
                group["step"] = steps
        else:
            fused = any(group.get("fused") for group in self.adam.param_groups)
            for master in {id(s.master): s.master for s in self.slices.values() if s is not None}.values():
                device = master.device if fused else None
                self.adam.state[master]["step"] = torch.tensor(float(steps), device=device)
        if self.stage == 3:
            for index in range(len(self.optimizer.fp16_groups)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
            self.optimizer.checkpoint_event_epilogue()
