"""Detects ranks whose copies of the same weights have drifted apart.

Copies are updated by each rank for itself: weights that tensor parallelism does not cut on every rank of its group,
under ZeRO stage 0 all weights on every data-parallel rank. A kernel of another version on one node, or a faulty device,
lets them drift apart, and nothing in training would notice.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_crnet.engine.zero import held_partition
from megatron_crnet.model.weights import Weight

BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Checksums:
    """Sums over the bits of this rank's weights, and its place among the ranks.

    Attributes:
        pipeline, tensor, data: its ranks in the three dimensions of parallelism.
        replicated: by name, of the weights that are whole on every tensor-parallel rank.
        cut: by name, of the others; empty under ZeRO-3, which cuts all weights over data-parallel ranks.
    """

    rank: int
    pipeline: int
    tensor: int
    data: int
    replicated: dict[str, int]
    cut: dict[str, int]
    partitioned: bool

    @property
    def digest(self) -> tuple[int, int, int, int, str, str | None]:
        """What other ranks need to compare, in a few bytes: rank, place, digests over the two kinds of copies."""
        own = None if self.partitioned else _digest({**self.replicated, **self.cut})
        return self.rank, self.pipeline, self.tensor, self.data, _digest(self.replicated), own


def checksums(weights: Sequence[Weight], stage: int) -> Checksums:
    """Of the weights as the next step would use them; one short transfer to the host.

    Args:
        stage: ZeRO's.
    """
    partitioned = stage == 3
    tensors = [held_partition(weight.parameter) if partitioned else weight.local() for weight in weights]
    sums = _sums(tensors).tolist() if tensors else []
    named = [(weight, value) for weight, value in zip(weights, sums, strict=True)]
    return Checksums(
        dist.get_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        {weight.name: value for weight, value in named if weight.shard_dim is None},
        {weight.name: value for weight, value in named if weight.shard_dim is not None},
        partitioned,
    )


def copies_differ(digests: Sequence[tuple[int, int, int, int, str, str | None]]) -> bool:
    """Whether any two ranks that hold copies have other bits.

    Args:
        digests: `Checksums.digest` of all ranks.
    """
    shared: dict[tuple[int, int], set[str | None]] = defaultdict(set)
    own: dict[tuple[int, int], set[str | None]] = defaultdict(set)
    for _, pipeline, tensor, data, replicated, whole in digests:
        shared[pipeline, data].add(replicated)
        own[pipeline, tensor].add(whole)
    return any(len(found) > 1 for found in (*shared.values(), *own.values()))


def describe_drift(everyone: Sequence[Checksums]) -> str:
    """A line that names the ranks that differ from most of their group, and the weights in which they do."""
    found: dict[int, set[str]] = defaultdict(set)
    for key, kinds in (("data", ("replicated",)), ("tensor", ("replicated", "cut"))):
        groups: dict[tuple[int, int], list[Checksums]] = defaultdict(list)
        for one in everyone:
            if key == "data" or not one.partitioned:
                groups[one.pipeline, getattr(one, key)].append(one)
        for group in groups.values():
            for kind in kinds:
                for name in getattr(group[0], kind):
                    values = {one.rank: getattr(one, kind).get(name) for one in group}
                    usual, _ = Counter(values.values()).most_common(1)[0]
                    for rank, value in values.items():
                        if value != usual:
                            found[rank].add(name)
    names = sorted(set().union(*found.values()))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"rank {', '.join(map(str, sorted(found)))} holds other bits of {names[0]}{more} than the ranks with copies of "
        "it: a faulty device, or other kernels than theirs; look at that node, and go on from an earlier checkpoint"
    )


def _sums(tensors: Sequence[Tensor]) -> Tensor:
    """Sums over bits, [tensors], where the first tensor is: under offload_param some are on the host, some are not."""
    found = [tensor.detach().view(BITS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack([value.to(found[0].device) for value in found])


def _digest(values: dict[str, int]) -> str:
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:16]
