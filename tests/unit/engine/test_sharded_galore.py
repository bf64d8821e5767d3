"""Owners and rounds: even shares, and the parts of a matrix put together and cut again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_crnet.engine.param_shard import Placement, overlap
from megatron_crnet.engine.sharded_galore import ShardedMatrix, assign_owners, in_rounds
from megatron_crnet.model.weights import Weight


def test_the_largest_part_owns_where_parameters_are_cut_one_after_another() -> None:
    # six matrices of 60 elements over three ranks, with a boundary inside of the third one
    parts = [[60, 0, 0], [60, 0, 0], [10, 50, 0], [0, 60, 0], [0, 10, 50], [0, 0, 60]]
    assert assign_owners(parts) == [0, 0, 1, 1, 2, 2]


def test_ranks_take_turns_where_all_hold_as_much() -> None:
    owners = assign_owners([[8, 8, 8, 8]] * 6 + [[20, 20, 20, 20]] * 2)
    assert sorted(owners[6:]) == [0, 1]
    assert [owners.count(rank) for rank in range(4)] == [1, 1, 3, 3]


def test_no_rank_owns_more_than_its_share_and_one_matrix() -> None:
    parts = [[5, 1]] * 10
    owners = assign_owners(parts)
    assert owners.count(0) <= 6


def test_a_round_has_a_matrix_of_each_owner_the_largest_first() -> None:
    rounds = in_rounds([0, 1, 0, 1, 1], [5, 7, 9, 8, 1])
    assert rounds == [{0: 2, 1: 3}, {0: 0, 1: 1}, {1: 4}]
    assert in_rounds([], []) == []


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
@pytest.mark.parametrize(("dim", "tp"), [(0, 1), (0, 3), (1, 1), (1, 3)])
def test_parts_of_a_matrix_make_it_and_are_cut_from_it(dim: int, tp: int, replicas: int) -> None:
    """A matrix of 8 x 10 behind 2 rows of another, on tensor-parallel ranks with padding, cut over replicas."""
    torch.manual_seed(0)
    shape = (8, 10)
    whole, local = torch.randn(shape), -(-shape[dim] // tp)
    columns = 12 if tp == 1 else local if dim == 1 else shape[1]
    matrices, parts = {}, {}
    for t in range(tp):
        span = range(t * local, min((t + 1) * local, shape[dim]))
        held = (len(span), shape[1]) if dim == 0 else (shape[0], len(span))
        parameter = nn.Parameter(torch.zeros(3 + (local if dim == 0 else shape[0]), columns))  # alike on all ranks
        index = (slice(2, 2 + held[0]), slice(held[1]))
        weight = Weight("w", parameter, index, shape, dim, span)
        parameter.data[index] = weight.shard(whole)
        numel = parameter.numel()
        size = -(-numel // replicas)
        shards = [overlap(0, numel, d * size, size) for d in range(replicas)]
        for d, (offset, count) in enumerate(shards):
            values = parameter.data.view(-1)[offset : offset + count]
            master = nn.Parameter(torch.cat([torch.full((3,), 9.0), values]))
            matrices[d, t] = ShardedMatrix(weight, Placement(master, 3, shards), (t, tp), d, parameter.shape)
            parts[d, t] = matrices[d, t].weights
    order = [(d, t) for d in range(replicas) for t in range(tp)]
    for matrix in matrices.values():
        assert matrix.numel == [parts[key].numel() for key in order]
        assert torch.equal(matrix.assemble([parts[key] for key in order]), whole)
        assert all(torch.equal(one, parts[key]) for one, key in zip(matrix.cut(whole), order, strict=True))
