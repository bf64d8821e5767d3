"""Weights and moments of maps whose rank changes, for the engine of the next phase (`config/phases.py`).

    growth      A gets rows, drawn as in a new model, B columns of zeros: the map computes what it did. Moments of both
                are zero there, those of the old rows and columns go on
    shrinking   A' = P A and B' = B Q with the best approximation of B A of rank r' (Eckart and Young), cut evenly:
                B' = U sqrt(S), A' = sqrt(S) V. First moments go through the same matrices, second ones through their
                squares, as if entries were independent. Where B A has a rank below r', the rows of A' that are left
                over are drawn as those of a new model, as neither factor would get a gradient if both were zero

With B = Q_B R_B and A = L_A Q_A the singular values of B A are those of the small R_B L_A, and R_B^T R_B = B^T B,
L_A L_A^T = A A^T: sums over rows and columns, wherever tensor parallelism has cut them. The rank is never cut.

Singular vectors are given up to their signs, and close ones up to a rotation, which another rounding changes. So all
ranks that hold a part or a copy of a map take P and Q of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_crnet.config.megatron import CRNetTransformerConfig
from megatron_crnet.distributed.process_groups import replica_group
from megatron_crnet.engine.state_kinds import KINDS, MASTER, MOMENTS
from megatron_crnet.model.gpt import CRNetModel
from megatron_crnet.model.weights import Weight, canonical_weights, initial_value

States = dict[str, dict[str, Tensor]]
"""By canonical name, this rank's shards of fp32 master and moments, by kind."""
A, B = ".a.weight", ".b.weight"
UNKNOWN = 1e-10
"""Of the largest singular value of B A, below which one counts as zero."""


@torch.no_grad()
def change_ranks(states: States, model: CRNetModel, seed: int, device: torch.device) -> None:
    """Bring states of a model to the ranks of another one, in place; a collective call of all ranks of a stage.

    Args:
        states: of the model so far, in host memory.
        model: the next one, or a chunk of it, in the same layout.
        seed: `training.seed`, which new rows of A are drawn from.
        device: where factors are decomposed.
    """
    config, group = model.config, model.pg_collection.tp
    named = {weight.name: weight for weight in canonical_weights(model)}
    for name, weight in named.items():
        if not name.endswith(A):
            continue
        of_a, of_b, rank = states[name], states[name_of_b(name)], weight.shape[0]
        before = of_a[MASTER].shape[0]
        if rank > before:
            _grow(of_a, of_b, rank, _drawn(weight, config, seed))
        elif rank < before:
            both = weight, named[name_of_b(name)]
            factors = of_a[MASTER], of_b[MASTER].t()
            gram_a, gram_b = (
                gram(x.to(device), None if w.is_whole else group) for x, w in zip(factors, both, strict=True)
            )
            holders = [*([] if is_held_alone(weight) else [group]), replica_group(weight.parameter)]
            p, q = (_of_first(x, holders).to("cpu") for x in reductions(gram_a, gram_b, rank))
            shrink(of_a, of_b, p, q, partial(_drawn, weight, config, seed))


def name_of_b(name: str) -> str:
    """The canonical name of the B to the A of this name."""
    return name.removesuffix(A) + B


def is_held_alone(a: Weight) -> bool:
    """Whether no other tensor-parallel rank has a part or a copy of a map: it is an expert's, of this rank alone.

    Args:
        a: its A.
    """
    return a.is_whole and a.shard_dim is not None


def _grow(a: dict[str, Tensor], b: dict[str, Tensor], rank: int, drawn: Tensor) -> None:
    before = a[MASTER].shape[0]
    for kind in KINDS:
        a[kind] = F.pad(a[kind], (0, 0, 0, rank - before))
        b[kind] = F.pad(b[kind], (0, rank - before))
    a[MASTER][before:] = drawn[before:]


def shrink(a: dict[str, Tensor], b: dict[str, Tensor], p: Tensor, q: Tensor, draw: Callable[[], Tensor]) -> None:
    """Take the states of a map's factors, whole or a shard, through P and Q, in place.

    Args:
        draw: gives initial values of A', of which the rows are taken that P leaves zero.
    """
    for kind in KINDS:
        left, right = (p, q) if kind != MOMENTS[1] else (p.square(), q.square())
        a[kind] = (left @ a[kind].double()).to(a[kind].dtype)
        b[kind] = (b[kind].double() @ right).to(b[kind].dtype)
    unused = p.eq(0).all(1)
    if unused.any():
        a[MASTER][unused] = draw()[unused]


def _drawn(a: Weight, config: CRNetTransformerConfig, seed: int) -> Tensor:
    return a.shard(initial_value(a.name, a.shape, config, seed))


def _of_first(factor: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """The factor that the first rank of every group has."""
    for group in groups:
        dist.broadcast(factor, dist.get_global_rank(group, 0), group)
    return factor


def gram(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The inner products of whole rows, of which each rank holds a part, in fp64."""
    wide = rows.double()
    gram = wide @ wide.t()
    if group is not None and group.size() > 1:
        dist.all_reduce(gram, group=group)
    return gram


def reductions(gram_a: Tensor, gram_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """P [r', r] and Q [r, r'], for which B Q P A is the best approximation of B A of rank r'.

    Args:
        gram_a: A A^T, [r, r].
        gram_b: B^T B, [r, r].
    """
    root_a, inverse_a = root(gram_a)
    root_b, inverse_b = root(gram_b)
    u, s, v = torch.linalg.svd(root_b @ root_a)
    scale = torch.where(s > s.max() * UNKNOWN, s, 0)[:rank].sqrt()
    return scale[:, None] * v[:rank] @ inverse_a, inverse_b @ u[:, :rank] * scale


def root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of a Gram matrix and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(gram)
    held = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    roots = torch.where(held, values, 0).sqrt()
    inverse = torch.where(held, roots, 1).reciprocal() * held
    return vectors * roots @ vectors.t(), vectors * inverse @ vectors.t()
