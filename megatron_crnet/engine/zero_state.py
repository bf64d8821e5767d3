"""fp32 masters, moments and gradients by parameter: what all ZeRO stages have in common.

Where DeepSpeed keeps them is known to `zero.py` alone, which has a class per stage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from deepspeed import DeepSpeedEngine
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_crnet.distributed.process_groups import replica_group
from megatron_crnet.engine.adam8bit import AdamW8bit, BlockwiseMoment
from megatron_crnet.engine.optimizer import is_partial
from megatron_crnet.engine.param_shard import (
    ParamShard,
    Placement,
    equal_parts,
    exchange_shards,
    frozen_shard,
)
from megatron_crnet.engine.sharded_galore import ShardedGaLore
from megatron_crnet.engine.state_kinds import KINDS, MASTER
from megatron_crnet.model.weights import Weight
from megatron_crnet.utils.errors import CheckpointError


class ZeroState(ABC):
    """What one DeepSpeed engine keeps per parameter: gradients, fp32 master weights and Adam's moments."""

    stage = 0

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine, self.optimizer, self.device = engine, engine.optimizer, engine.device
        self._projected: set[nn.Parameter] = set()
        self.swaps = bool(getattr(self.optimizer, "swap_optimizer", False))
        """State lives on NVMe; DeepSpeed alone can read it."""

    # where DeepSpeed keeps what

    @property
    @abstractmethod
    def adam(self) -> torch.optim.Optimizer:
        """The optimizer inside of DeepSpeed's."""

    @abstractmethod
    def local_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of this rank's parameter, which ZeRO-3 empties."""

    @abstractmethod
    def placement(self, parameter: nn.Parameter) -> Placement:
        """Where the replicas keep a parameter's fp32 master."""

    @abstractmethod
    def poison_gradients(self) -> None:
        """Make all gradients NaN, so that DeepSpeed drops them."""

    @abstractmethod
    def buffers(self) -> Iterator[Tensor]:
        """Every buffer in which gradients are reduced."""

    # the optimizer

    def forget_first_step(self) -> None:
        """Undo the step (with rate 0) that DeepSpeed's wrapper has taken to allocate the moments.

        It would count in Adam's bias correction.
        """
        self.adam.state.clear()
        for group in self.adam.param_groups:
            group.pop("step", None)  # where Apex's FusedAdam counts

    def prepare(
        self, projected: Sequence[Weight], progress: Callable[[], None], add_: Callable[[Tensor, Tensor], None]
    ) -> None:
        """Before the first step: masters of frozen parameters; what the optimizer's tensors hold, what it projects.

        Args:
            progress: is called in the course of long updates.
            add_: adds a gradient to a sum in fp32, where DeepSpeed is not to do that.
        """
        shards = self._adam_shards()
        if isinstance(self.adam, AdamW8bit):
            for shard in shards:
                self.adam.segments.setdefault(shard.master, []).append((shard.start, shard.numel))
        if self.galore is not None:
            self._projected = {weight.parameter for weight in projected}
            parts = [(w, self.placement(w.parameter), self.local_shape(w.parameter)) for w in projected]
            replica = parallel_state.get_data_parallel_rank() if self.stage > 0 else None
            self.galore.plan(parts, replica, progress)

    def kinds_of(self, parameter: nn.Parameter) -> Sequence[str]:
        """What is kept of a parameter: frozen ones have no moments, of those that GaLore projects it keeps its own."""
        return KINDS if parameter.requires_grad and parameter not in self._projected else (MASTER,)

    @property
    def galore(self) -> ShardedGaLore | None:
        """The optimizer, if it is GaLore, which keeps the state of whole matrices."""
        return self.adam if isinstance(self.adam, ShardedGaLore) else None

    def release(self) -> None:
        """Let go of the weights and of what DeepSpeed has tied to them: views of its buffers, methods bound to them.

        These are cycles that PyTorch's tensors do not let Python collect.
        """
        for parameter in self.engine.module.parameters():
            vars(parameter).clear()
            parameter.grad, parameter.data = None, torch.empty(0, dtype=parameter.dtype, device=parameter.device)

    # gradients

    def reduce_gradients(self) -> None:
        """Average gradients over replicas, where no hook has."""
        self.engine.allreduce_gradients()

    def partial_gradients(self) -> list[Tensor]:
        """Gradients that are partial sums over tensor-parallel ranks, wherever DeepSpeed keeps them."""
        return [g for p in self.engine.module.parameters() if is_partial(p) and (g := self.gradient(p)) is not None]

    reduces_in_place = True
    """`reduce_gradients` leaves whole gradients where `gradient` gives them."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The whole gradient, where a stage keeps it; None if there is none."""
        return parameter.grad

    # master weights and moments

    def exact(self, parameter: nn.Parameter) -> Tensor:
        """The whole value of a parameter that is kept in fp32; a collective call over replicas."""
        return parameter.detach()

    @cached_property
    def shards(self) -> dict[nn.Parameter, ParamShard | None]:
        """This rank's shard of every parameter; None where it has none."""
        return {p: self._shard(p) for p in self.engine.module.parameters()}

    def _adam_shards(self) -> list[ParamShard]:
        """Of what Adam updates as it lies."""
        return [shard for p, shard in self.shards.items() if shard is not None and self.kinds_of(p) == KINDS]

    def _shard(self, parameter: nn.Parameter) -> ParamShard | None:
        offset, numel = self._places(parameter)[self._replica(parameter)]
        if not numel:
            return None
        if not parameter.requires_grad:  # DeepSpeed's optimizer does not know it
            return frozen_shard(*self._held(parameter, offset), offset, numel)
        placement = self.placement(parameter)
        return ParamShard(placement.master, placement.start, offset, numel)

    def _held(self, parameter: nn.Parameter, offset: int) -> tuple[Tensor, int]:
        """Memory of a frozen parameter, and where in it this replica's share, from `offset` on, starts."""
        return parameter, offset

    def _places(self, parameter: nn.Parameter) -> Sequence[tuple[int, int]]:
        """Offset and size of each replica's shard."""
        if parameter.requires_grad:
            return self.placement(parameter).shards
        return equal_parts(self.local_shape(parameter).numel(), self._replicas(parameter) if self.stage > 0 else 1)

    def _replica(self, parameter: nn.Parameter) -> int:
        """Number of this rank's shard in placements."""
        return replica_group(parameter).rank() if self.stage > 0 else 0

    def _replicas(self, parameter: nn.Parameter) -> int:
        return replica_group(parameter).size()

    def read(self, parameter: nn.Parameter, kind: str, owners: Collection[int] | None = None) -> Tensor | None:
        """The whole fp32 master or moment, of the parameter's local shape; a collective call over replicas.

        Each replica sends its shard to those that are to have the whole, and nothing else travels.

        Args:
            owners: ranks of its `replica_group` that get it; the others get None. All of them by default.
        """
        if self.swaps:
            return self.optimizer.get_full_hp_param(parameter, None if kind == MASTER else kind).float()
        found, group = self.shards[parameter], replica_group(parameter)
        mine = None if found is None else found.read(self._tensor(parameter, found.master, kind)).to(self.device)
        whole = None
        if owners is None or group.rank() in owners:
            whole = torch.zeros(self.local_shape(parameter).numel(), device=self.device)
            if found is not None and mine is not None:
                found.cut(whole).copy_(mine)
        if self.stage > 0:
            exchange_shards(mine, whole, self._places(parameter), owners, group)
        return None if whole is None else whole.view(self.local_shape(parameter))

    def write(self, parameter: nn.Parameter, values: Mapping[str, Tensor]) -> None:
        """Set master and moments from whole values; the parameter itself follows, under ZeRO-3 with `finish`."""
        found = self.shards[parameter]
        if found is not None:
            for kind, whole in values.items():
                tensor = self._tensor(parameter, found.master, kind)
                found.write(tensor, found.cut(whole))
                if kind != MASTER:
                    self.adam.state[found.master][kind] = tensor
        self._write_parameter(parameter, values[MASTER])

    def _write_parameter(self, parameter: nn.Parameter, whole: Tensor) -> None:
        parameter.detach().copy_(whole)

    def _tensor(self, parameter: nn.Parameter, master: Tensor, kind: str) -> Tensor | BlockwiseMoment:
        if kind == MASTER:
            return master
        if kind in self.adam.state[master]:
            return self.adam.state[master][kind]
        # before the first update; not put there, because an optimizer completes a state that is empty alone
        if isinstance(self.adam, AdamW8bit):
            return self.adam.new_moment(master, kind, is_matrix=len(self.local_shape(parameter)) >= 2)
        return torch.zeros_like(master, requires_grad=False)

    @property
    def steps(self) -> int:
        """How often Adam has updated, for its bias correction."""
        if self.galore is not None:
            return self.galore.count
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
            for master in {id(shard.master): shard.master for shard in self._adam_shards()}.values():
                device = master.device if fused else None
                self.adam.state[master]["step"] = torch.tensor(float(steps), device=device)
        if self.galore is not None:
            self.galore.restore_count(steps)

    # what a simulated step counts

    def weights(self) -> list[Tensor]:
        """Every tensor of weights."""
        return [parameter.data for parameter in self.engine.module.parameters()]

    def state(self) -> list[Tensor]:
        """Every tensor of master weights and moments, of weights where they are the masters."""
        found = [p.data for group in self.adam.param_groups for p in group["params"]]
        found += self.galore.tensors if self.galore is not None else []
        for value in (value for state in self.adam.state.values() for value in state.values()):
            found += value.tensors if isinstance(value, BlockwiseMoment) else [value] if torch.is_tensor(value) else []
        return found
