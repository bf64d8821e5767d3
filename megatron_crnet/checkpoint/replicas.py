"""Detects ranks whose copies of the same weights have drifted apart.

Each rank updates its own copies: of the weights that tensor parallelism does not cut, under ZeRO 0 to 2 of all weights
over data-parallel ranks, and of a tied embedding on the first and the last pipeline stage. Another version of a kernel
on one node, or a faulty device, lets them drift apart unnoticed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_crnet.distributed.consensus import digest_of, gather
from megatron_crnet.distributed.process_groups import replica_group
from megatron_crnet.distributed.watchdog import ranks_line
from megatron_crnet.engine.zero import held_partition
from megatron_crnet.model.reference import EMBEDDING
from megatron_crnet.model.weights import Weight

BITS = {2: torch.int16, 4: torch.int32}


Group = tuple[str, int, int]
"""Ranks that hold copies of the same weights: the dimension along which they lie, their ranks in the other two; of
experts that are spread over replicas `experts`, with the pipeline and the expert-parallel rank."""
Checksums = dict[Group, dict[str, int]]
"""By group of this rank, the sum over the bits of each weight that is copied within it."""


def checksums(weights: Sequence[Weight], stage: int) -> Checksums:
    """Of the weights as the next step would use them; one short transfer to the host.

    Args:
        stage: ZeRO's.
    """
    partitioned = stage == 3
    tensors = [held_partition(weight.parameter) if partitioned else weight.local() for weight in weights]
    sums = _sums(tensors).tolist() if tensors else []
    named = {weight.name: value for weight, value in zip(weights, sums, strict=True)}
    replicated = {weight.name: named[weight.name] for weight in weights if weight.shard_dim is None}
    pipeline, tensor, data = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    found: Checksums = {("tensor", pipeline, data): replicated}
    if EMBEDDING in named:  # on the last stage a tied one
        found["pipeline", tensor, data] = {EMBEDDING: named[EMBEDDING]}
    if partitioned:
        return found
    everywhere = parallel_state.get_data_parallel_group()
    spread = {w.name: named.pop(w.name) for w in weights if replica_group(w.parameter) is not everywhere}
    if spread:
        found["experts", pipeline, parallel_state.get_expert_model_parallel_rank()] = spread
    return {**found, ("data", pipeline, tensor): named}


def compare_copies(sums: Checksums, group: dist.ProcessGroup | None = None) -> str | None:
    """A warning on copies that differ between ranks, None if there are none; a collective call of `group`.

    All sums are sent only where a digest differs.
    """
    digests = {copied: digest_of(values) for copied, values in sums.items()}
    found: dict[Group, set[bytes]] = defaultdict(set)
    for one in gather(digests, group):
        for copied, digest in one.items():
            found[copied].add(digest)
    if all(len(different) == 1 for different in found.values()):
        return None
    return _describe_drift(gather(sums, group))


def _describe_drift(everyone: Sequence[Checksums]) -> str:
    """Names the ranks that differ from most of their group, and the weights in which they do."""
    values: dict[tuple[Group, str], dict[int, int]] = defaultdict(dict)
    for rank, sums in enumerate(everyone):
        for copied, named in sums.items():
            for name, value in named.items():
                values[copied, name][rank] = value
    ranks, names = set(), set()
    for (_, name), by_rank in values.items():
        usual, _ = Counter(by_rank.values()).most_common(1)[0]
        if different := {rank for rank, value in by_rank.items() if value != usual}:
            ranks |= different
            names.add(name)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"{ranks_line(ranks)} holds other bits of {min(names)}{more} than the ranks with copies of it: a faulty "
        "device, or other kernels than theirs; look at that node, and go on from an earlier checkpoint"
    )


def _sums(tensors: Sequence[Tensor]) -> Tensor:
    """Sums over bits, [tensors], where the first tensor is: under offload_param some are on the host, some are not."""
    found = [tensor.detach().view(BITS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack([value.to(found[0].device) for value in found])
