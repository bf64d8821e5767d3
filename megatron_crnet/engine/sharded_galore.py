"""GaLore under ZeRO and tensor parallelism: one owner per matrix among the ranks that hold parts of it.

ZeRO cuts flattened parameters anywhere, tensor parallelism cuts rows or columns, and the SVD of a part is not a part of
the SVD. So each matrix has an owner, which alone keeps its `Subspace`: where that is even, the rank that holds most of
it. At every update, in rounds of one matrix per owner:

    1. the others send their parts of the gradient (reduced and clipped) to the owner       all-to-all, fp32
    2. the owner assembles the matrix and computes the direction (engine/galore.py)
    3. the owner sends back each rank's part of the direction                               all-to-all, fp32
    4. each rank moves its part of the fp32 weights

No projection ever travels, and all parts get the same direction. Under ZeRO-0, where replicas keep everything, only
tensor-parallel ranks exchange; replicas take their projections from the first one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from megatron_crnet.engine.adam import ParamGroup
from megatron_crnet.engine.galore import GaLore, Projection, Subspace, apply
from megatron_crnet.engine.param_shard import Placement, overlap
from megatron_crnet.model.weights import Weight

Round = Mapping[int, "ShardedMatrix"]
"""By owner's number in the group, in ascending order: its matrix."""


class ShardedMatrix:
    """A canonical matrix [m, n] and its parts: tensor-parallel blocks, which data-parallel ranks have cut once more.

    A block is rows of a local parameter, or of a matrix of a stack of experts, whose last columns may be padding.

    Args:
        tp_size: tensor-parallel ranks.
        dp_rank: number of this rank's shard in `placement`.
        shape: of the local parameter.
    """

    def __init__(
        self, weight: Weight, placement: Placement, tp: tuple[int, int], dp_rank: int, shape: torch.Size
    ) -> None:
        (rank, self.tp_size), columns = tp, shape[-1]
        self.name, self.shape, self.dim = weight.name, (weight.shape[0], weight.shape[1]), weight.shard_dim or 0
        self.columns = columns
        size = self.shape[self.dim]
        # rank t holds elements [t local, (t + 1) local) of the dimension that is split
        local = size if weight.shard_dim is None else weight.span.start // rank if rank else len(weight.span)
        self.spans = [range(min(t * local, size), min((t + 1) * local, size)) for t in range(self.tp_size)]
        *of_expert, of_rows, _ = weight.index
        first = (sum(of_expert) * shape[-2] + of_rows.start) * columns
        self._cuts = [[overlap(first, rows * columns, *shard) for shard in placement.shards] for rows in self._rows()]
        own = self._cuts[rank][dp_rank]
        self.numel = [block[d][1] for d in range(len(placement.shards)) for block in self._cuts]
        """Elements of each rank's part; tensor-parallel ranks vary first."""
        self._master, self._elements = placement.master, slice(0, 0)
        if own[1]:
            begin = placement.start + first + own[0] - placement.shards[dp_rank][0]
            self._elements = slice(begin, begin + own[1])

    def _rows(self) -> list[int]:
        return [len(span) if self.dim == 0 else self.shape[0] for span in self.spans]

    def part(self, tensor: Tensor) -> Tensor:
        """This rank's part of the weights, or of their gradient: a flat view."""
        return tensor.detach().view(-1)[self._elements]

    @property
    def weights(self) -> Tensor:
        """This rank's part of the fp32 weights."""
        return self.part(self._master)

    @property
    def gradient(self) -> Tensor:
        """This rank's part of the gradient."""
        assert self._master.grad is not None
        return self._master.grad.reshape(-1)[self._elements]

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        """The matrix, from the parts of all ranks."""
        blocks = [
            torch.cat(list(parts[t :: self.tp_size])).view(rows, self.columns)[:, : self._width(t)]
            for t, rows in enumerate(self._rows())
        ]
        return torch.cat(blocks, self.dim) if len(blocks) > 1 else blocks[0]

    def _width(self, t: int) -> int:
        return len(self.spans[t]) if self.dim == 1 else self.shape[1]

    def cut(self, whole: Tensor) -> list[Tensor]:
        """The parts of all ranks, with zeros for padding."""
        blocks = []
        for span in self.spans:
            block = whole.narrow(self.dim, span.start, len(span))
            padding = self.columns - block.shape[1]
            blocks.append((F.pad(block, (0, padding)) if padding else block).reshape(-1))
        shards = range(len(self.numel) // self.tp_size)
        starts = [[0, *itertools.accumulate(numel for _, numel in cuts)] for cuts in self._cuts]
        return [blocks[t][starts[t][d] : starts[t][d + 1]] for d in shards for t in range(self.tp_size)]


@dataclass
class Plan:
    """The rounds of the matrices that are updated together.

    Attributes:
        count: updates so far.
    """

    rounds: list[Round]
    count: int = 0


def assign_owners(parts: Sequence[Sequence[int]]) -> list[int]:
    """The owner of each matrix: the rank with the largest part, as long as no rank owns much more than its share.

    Args:
        parts: of each matrix, the elements that each rank holds.
    """
    sizes = [sum(numel) for numel in parts]
    ranks = range(len(parts[0]) if parts else 0)
    loads, owners = [0 for _ in ranks], [0 for _ in parts]
    most = sum(sizes) / max(len(ranks), 1) + max(sizes, default=0)
    for index in sorted(range(len(parts)), key=lambda index: -sizes[index]):
        able = [rank for rank in ranks if loads[rank] + sizes[index] <= most]
        owners[index] = max(able, key=lambda rank: (parts[index][rank], -loads[rank], -rank))
        loads[owners[index]] += sizes[index]
    return owners


def in_rounds(owners: Sequence[int], sizes: Sequence[int]) -> list[dict[int, int]]:
    """By owner, the index of a matrix: each owner's largest first, so that those of a round are of about one size."""
    owned: dict[int, list[int]] = {}
    for index in sorted(range(len(owners)), key=lambda index: -sizes[index]):
        owned.setdefault(owners[index], []).append(index)
    rounds = max(map(len, owned.values()), default=0)
    return [{rank: owned[rank][i] for rank in sorted(owned) if i < len(owned[rank])} for i in range(rounds)]


class ShardedGaLore(GaLore):
    """GaLore on the tensors that DeepSpeed hands to its optimizer, once `plan` has said what they hold."""

    def __init__(self, groups: list[ParamGroup], projection: Projection, **options: Any) -> None:
        super().__init__(groups, projection, **options)
        self.subspaces: dict[str, Subspace] = {}
        """Of the matrices that this rank owns, by canonical name."""
        self._plans: dict[Tensor, Plan] = {}
        self._progress: Callable[[], None] = lambda: None
        self._group: dist.ProcessGroup | None = None
        self._replicas: dist.ProcessGroup | None = None
        self._rank, self._ranks = 0, 1

    def plan(
        self,
        parts: Sequence[tuple[Weight, Placement, torch.Size]],
        replica: int | None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Assign owners to the matrices that are projected.

        Args:
            parts: each matrix, where the replicas keep the parameter that holds it, and that parameter's local shape.
            replica: this rank's number among those that have cut the parameters; None where each has the whole.
            progress: is called in each round, because all decompositions of a large model together may take longer
                than the watchdog lets a rank be without progress.
        """
        self._progress = progress
        tp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
        if replica is None:
            self._group = parallel_state.get_tensor_model_parallel_group()
            self._replicas = parallel_state.get_data_parallel_group()
        else:
            self._group = parallel_state.get_tensor_and_data_parallel_group()
        self._rank, self._ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        assert self._rank == (replica or 0) * tp[1] + tp[0], (
            "parts are in the order of tensor-parallel ranks, then replicas"
        )
        # a call of `step` updates a flat tensor, or all parameters of a group: its first one stands for it
        first = {tensor: group["params"][0] for group in self.param_groups for tensor in group["params"]}
        together: dict[Tensor, list[ShardedMatrix]] = {}
        for weight, placement, shape in parts:
            matrix = ShardedMatrix(weight, placement, tp, replica or 0, shape)
            together.setdefault(first.get(placement.master, placement.master), []).append(matrix)
        owners = iter(assign_owners([matrix.numel for found in together.values() for matrix in found]))
        for tensor, found in together.items():
            mine = [next(owners) for _ in found]
            rounds = in_rounds(mine, [sum(matrix.numel) for matrix in found])
            self._plans[tensor] = Plan([{rank: found[i] for rank, i in one.items()} for one in rounds])
        self.subspaces = {matrix.name: Subspace(self.projection, share=self._share) for matrix in self.owned}

    @property
    def owned(self) -> Iterator[ShardedMatrix]:
        """The matrices whose state this rank keeps."""
        rounds = itertools.chain.from_iterable(plan.rounds for plan in self._plans.values())
        return (one[self._rank] for one in rounds if self._rank in one)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the owned states."""
        return [tensor for subspace in self.subspaces.values() for tensor in subspace.tensors.values()]

    def states(self) -> dict[str, dict[str, Tensor]]:
        """The owned states by name and kind; zeros before the first update."""
        return {
            matrix.name: self.subspaces[matrix.name].tensors
            or {
                kind: torch.zeros(shape, device=matrix.weights.device)
                for kind, shape in self.projection.state_shapes(matrix.shape).items()
            }
            for matrix in self.owned
        }

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Set the state of an owned matrix, by kind; with none it is as before the first update."""
        device = next(matrix for matrix in self.owned if matrix.name == name).weights.device
        self.subspaces[name].tensors = {kind: tensor.to(device) for kind, tensor in tensors.items()}

    def _share(self, projection: Tensor) -> None:
        """Replace this replica's projection by that of the first one, whose SVD may have rounded otherwise."""
        if self._replicas is not None and dist.get_world_size(self._replicas) > 1:
            dist.broadcast(projection, dist.get_global_rank(self._replicas, 0), self._replicas)

    @property
    def count(self) -> int:
        """Updates so far."""
        return max(plan.count for plan in self._plans.values())

    def restore_count(self, steps: int) -> None:
        """Go on as after `steps` updates."""
        for plan in self._plans.values():
            plan.count = steps

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient; a collective call over the ranks that hold parts of matrices."""
        assert closure is None
        for group in (group for group in self.param_groups if group["params"]):  # ZeRO-3 empties those of other calls
            if not group["is_projected"]:
                for tensor in (tensor for tensor in group["params"] if tensor.grad is not None):
                    self.update_by_adamw(tensor, tensor.grad, group)
            elif self._plans:  # DeepSpeed also steps before there is a plan
                self._update_matrices(self._plans[group["params"][0]], group)

    def _update_matrices(self, plan: Plan, group: ParamGroup) -> None:
        plan.count += 1
        for one in plan.rounds:
            self._progress()
            own = one.get(self._rank)
            received = self._exchange([matrix.gradient for matrix in one.values()], one, to_owners=True)
            directions = self._directions(own, received, plan.count, group) if own is not None else []
            for matrix, direction in zip(one.values(), self._exchange(directions, one, to_owners=False), strict=True):
                apply(matrix.weights, direction, group)

    def _directions(self, matrix: ShardedMatrix, received: list[Tensor], step: int, group: ParamGroup) -> list[Tensor]:
        """By rank, its part of the direction of a matrix; empties `received`, which is as large."""
        gradient = matrix.assemble(received)
        received.clear()
        direction = self.subspaces[matrix.name].direction(gradient, step, group["betas"], group["eps"])
        del gradient
        return matrix.cut(direction)

    def _exchange(self, parts: list[Tensor], one: Round, to_owners: bool) -> list[Tensor]:
        """Send parts of a round's matrices to their owners, or from them to all ranks; empties `parts`.

        Args:
            parts: this rank's parts of all matrices, or all ranks' parts of the own matrix.

        Returns:
            The other of the two; nothing to owners of none.
        """
        of_ranks = one[self._rank].numel if self._rank in one else [0] * self._ranks
        of_matrices = [one[rank].numel[self._rank] if rank in one else 0 for rank in range(self._ranks)]
        sends, receives = (of_matrices, of_ranks) if to_owners else (of_ranks, of_matrices)
        by_rank = dict(zip(one if to_owners else range(self._ranks), parts, strict=False))
        parts.clear()
        own = by_rank.pop(self._rank, None)  # does not travel
        found = self._all_to_all(list(by_rank.values()), self._elsewhere(sends), self._elsewhere(receives), one)
        if own is not None:
            found[self._rank] = own
        if to_owners:
            return found if self._rank in one else []
        return [found[rank] for rank in one]

    def _elsewhere(self, numel: Sequence[int]) -> list[int]:
        return [0 if rank == self._rank else elements for rank, elements in enumerate(numel)]

    def _all_to_all(self, parts: list[Tensor], sends: list[int], receives: list[int], one: Round) -> list[Tensor]:
        """By rank, what it has sent; no call where every owner holds its whole matrix."""
        empty = next(iter(one.values())).weights.new_empty(0)
        received = empty.new_empty(sum(receives))
        if not all(matrix.numel[owner] == sum(matrix.numel) for owner, matrix in one.items()):
            sent = torch.cat([empty, *parts])
            dist.all_to_all_single(received, sent, receives, sends, group=self._group)
        return list(received.split(receives))
