"""Where ranks keep their parts of a parameter's fp32 master weights and moments, and how a whole is collected."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_crnet.engine.adam8bit import BlockwiseMoment


@dataclass(frozen=True)
class ParamShard:
    """Elements [offset, offset + numel) of a flattened parameter: elements [start, start + numel) of a master.

    Attributes:
        master: an fp32 tensor that the optimizer updates; the moments in its state have the same shape.
    """

    master: Tensor
    start: int
    offset: int
    numel: int

    def read(self, tensor: Tensor | BlockwiseMoment) -> Tensor:
        """This shard of the master or of one of its moments: a view, or fp32 values of an 8-bit moment."""
        if isinstance(tensor, BlockwiseMoment):
            return tensor.read(self.start)
        return tensor.detach().view(-1).narrow(0, self.start, self.numel)

    def write(self, tensor: Tensor | BlockwiseMoment, values: Tensor) -> None:
        """Set this shard of the master or of one of its moments."""
        if isinstance(tensor, BlockwiseMoment):
            tensor.write(self.start, values)
        else:
            self.read(tensor).copy_(values)

    def cut(self, whole: Tensor) -> Tensor:
        """This shard of the whole parameter's values."""
        return whole.view(-1).narrow(0, self.offset, self.numel)


def frozen_shard(held: Tensor, start: int, offset: int, numel: int) -> ParamShard:
    """A replica's share of a parameter that is not trained, in fp32.

    In an fp32 model that is the parameter's own memory. In bf16 it lies on the host, where only merges and checkpoints
    touch it, because what a merge adds may be less than bf16 can hold.
    """
    if held.dtype == torch.float32:
        return ParamShard(held, start, offset, numel)
    part = held.detach().view(-1).narrow(0, start, numel)
    return ParamShard(part.to("cpu", torch.float32, copy=True), 0, offset, numel)


@dataclass(frozen=True)
class Placement:
    """Where the replicas keep their shards of a parameter.

    Attributes:
        master: this rank's fp32 tensor.
        start: where in it this rank's shard begins, if there is one.
        shards: (offset, numel) in the flattened parameter, by rank among the replicas; one where nothing is cut.
    """

    master: Tensor
    start: int
    shards: Sequence[tuple[int, int]]


def equal_parts(numel: int, replicas: int) -> list[tuple[int, int]]:
    """Offset and size of each replica's part, of which the last may be smaller, or empty."""
    size = -(-numel // replicas)
    return [(d * size, max(min(size, numel - d * size), 0)) for d in range(replicas)]


def overlap(start: int, numel: int, offset: int, size: int) -> tuple[int, int]:
    """Where elements [offset, offset + size) meet [start, start + numel): relative to `start`, and how many."""
    low, high = max(start, offset), min(start + numel, offset + size)
    return low - start, max(high - low, 0)


def exchange_shards(
    mine: Tensor | None,
    whole: Tensor | None,
    shards: Sequence[tuple[int, int]],
    owners: Collection[int] | None,
    group: dist.ProcessGroup,
) -> None:
    """Send this replica's shard of a parameter to the owners, and receive the others' where this is one.

    Args:
        whole: flat values of an owner, into which the others' shards are put.
        shards: as in `Placement`.
        owners: ranks of the group; all of them by default.
        group: the replicas.
    """
    peers = [other for other in range(len(shards)) if other != dist.get_rank(group)]
    calls = [
        dist.P2POp(dist.isend, mine, dist.get_global_rank(group, other), group)
        for other in peers
        if mine is not None and (owners is None or other in owners)
    ]
    if whole is not None:
        calls += [
            dist.P2POp(dist.irecv, whole.narrow(0, *shards[other]), dist.get_global_rank(group, other), group)
            for other in peers
            if shards[other][1]
        ]
    for call in dist.batch_isend_irecv(calls) if calls else []:
        call.wait()
