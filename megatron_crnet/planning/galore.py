"""What GaLore keeps, computes and sends on a rank, by the same rules as `engine/sharded_galore.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from megatron_crnet.config.architectures import Group
from megatron_crnet.engine.galore import Projection
from megatron_crnet.engine.param_shard import overlap
from megatron_crnet.engine.sharded_galore import assign_owners, in_rounds
from megatron_crnet.planning.shards import PROJECTED, LocalModel


@dataclass(frozen=True)
class GaLoreShare:
    """Each the most of any rank of a stage.

    Attributes:
        state: elements of the projections and moments that it owns.
        largest: elements of a matrix.
        operations: of an update that keeps its projections.
        exchanged: elements that it sends to owners and gets back, or the other way round, whichever is more.
    """

    state: int
    largest: int
    operations: int
    exchanged: int


@lru_cache(maxsize=8)
def galore_share(model: LocalModel, dp_size: int) -> GaLoreShare:
    """The share of a rank of this stage, which memory, operations, volume and time ask for."""
    projection = Projection.of(model.config.optimizer)
    found = list(_matrices(model, dp_size))
    parts = [part for _, part in found]
    owners, sizes = assign_owners(parts), [sum(part) for part in parts]
    state, operations, exchanged = Counter[int](), Counter[int](), Counter[int]()
    for (shape, _), owner in zip(found, owners, strict=True):
        state[owner] += sum(map(prod, projection.state_shapes(shape).values()))
        operations[owner] += _operations(shape, projection)
    for one in in_rounds(owners, sizes):
        for rank in range(len(parts[0])):
            sent = sum(parts[index][rank] for owner, index in one.items() if owner != rank)
            received = sizes[one[rank]] - parts[one[rank]][rank] if rank in one else 0
            exchanged[rank] += 2 * max(sent, received)
    return GaLoreShare(max(state.values()), max(sizes), max(operations.values()), max(exchanged.values()))


def _operations(shape: tuple[int, int], projection: Projection) -> int:
    """Of projecting a gradient and the direction back."""
    (m, n), r, (left, right) = shape, projection.galore_rank, projection.sides(shape)
    if left and right:  # first to r rows, then to r columns; back in the same order
        return 2 * (r * m * n + r * n * r) + 2 * (m * r * r + m * r * n)
    return 4 * r * m * n


def _matrices(model: LocalModel, dp_size: int) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """Shapes of the stage's matrices, and the elements of each rank's part; tensor-parallel ranks vary first."""
    total = model.elements(PROJECTED)
    start = 0
    for _ in (layer for chunk in model.chunks for layer in chunk.layers):
        for group in model.transformer.table.architecture.groups:
            numel = sum(prod(model.transformer.table.local_shapes[p.name]) for p in group.positions)
            yield from _of_group(model, group, list(_shards(model.stage, dp_size, start, numel, total)))
            start += numel
        experts = model.transformer.table.architecture.experts
        for group in experts.groups if experts is not None else ():
            numel = model.transformer.table.num_experts * _expert_elements(model, group)
            yield from _of_experts(model, group, list(_shards(model.stage, dp_size, start, numel, total)))
            start += numel


def _shards(stage: int, dp_size: int, start: int, numel: int, total: int) -> Iterator[tuple[int, int]]:
    """How the replicas have cut a parameter that begins at `start` of its group's `total` elements."""
    if stage == 0:
        yield 0, numel
        return
    for replica in range(dp_size):
        if stage == 3:
            size = -(-numel // dp_size)
            yield overlap(0, numel, replica * size, size)
        else:
            size = -(-total // (2 * dp_size)) * 2
            yield overlap(start, numel, replica * size, size)


def _expert_elements(model: LocalModel, group: Group) -> int:
    """Elements of a group's matrices of one expert."""
    return sum(prod(model.transformer.table.shapes[name]) for name in group.names)


def _of_experts(
    model: LocalModel, group: Group, shards: list[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """The matrices of a stack, one expert's behind the other's."""
    first = 0
    for name in list(group.names) * model.transformer.table.num_experts:
        h_in, h_out = model.transformer.table.shapes[name]
        yield (h_out, h_in), [overlap(first, h_in * h_out, *shard)[1] for shard in shards]
        first += h_in * h_out


def _of_group(
    model: LocalModel, group: Group, shards: list[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """The matrices of a fused parameter, rows behind one another."""
    table, first = model.transformer.table, 0
    for position in (p.name for p in group.positions):
        (h_in, h_out), (columns, rows) = table.shapes[position], table.local_shapes[position]
        held = [h_out if group.is_row else max(min(rows, h_out - t * rows), 0) for t in range(model.tp)]
        yield (h_out, h_in), [overlap(first, block * columns, *shard)[1] for shard in shards for block in held]
        first += rows * columns
