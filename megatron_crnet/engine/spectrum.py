"""How the energy of low-rank maps lies over their ranks, which `rank_schedule.energy` is compared with.

The energy of a map is the sum of the squared singular values of its product B A: the eigenvalues of R A A^T R, where R
is the symmetric root of B^T B, both r x r (`rank_change.py`). Of a map that is to shrink the leading values are those
of its next rank, all that its best approximation keeps; of one that is to grow, those of the first half of its present
rank, rounded up: a flat spectrum has half of its energy there, one that has rank to spare nearly all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_crnet.config.positions import PositionTable
from megatron_crnet.distributed.process_groups import replica_group
from megatron_crnet.engine.rank_change import A, B, gram, is_held_alone, name_of_b, root
from megatron_crnet.engine.state_kinds import MASTER
from megatron_crnet.engine.zero_state import ZeroState
from megatron_crnet.model.gpt import CRNetModel
from megatron_crnet.model.weights import Weight, by_parameter, canonical_weights


def energies(gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """The squared singular values of B A, [r], the largest first.

    Args:
        gram_a: A A^T, [r, r].
        gram_b: B^T B, [r, r].
    """
    root_b, _ = root(gram_b)
    return torch.linalg.eigvalsh(root_b @ gram_a @ root_b).clamp(min=0).flip(0)


def leading_values(weight: str, table: PositionTable, following: PositionTable) -> int:
    """How many singular values of a map count as leading; 0 where its rank stays.

    Args:
        weight: canonical name of one of its factors.
        table, following: of the present ranks and of the next.
    """
    layer, position = int(weight.split(".")[2]), table.position_of(weight)
    before, after = table.ranks[layer][position], following.ranks[layer][position]
    return 0 if after == before else after if after < before else -(-before // 2)


def crosses(share: float, threshold: float, grows: bool) -> bool:
    """Whether ranks change at this share of the energy in leading values: they grow where it has become small, and
    shrink where it has become large."""
    return share <= threshold if grows else share >= threshold


@torch.no_grad()
def leading_share(zero: ZeroState, chunks: Sequence[CRNetModel], following: PositionTable) -> float:
    """The share of the energy of all maps whose ranks are to change that their leading singular values have.

    A collective call of all ranks, which get the same number; 1 where all these products are zero.

    Args:
        zero, chunks: this rank's part of the model, whose fp32 masters are measured.
        following: of the model with the next ranks.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=zero.device)
    for chunk in chunks:
        table, group = chunk.config.table, chunk.pg_collection.tp
        factors = [weight for weight in canonical_weights(chunk) if weight.name.endswith((A, B))]
        changing = [weight for weight in factors if leading_values(weight.name, table, following)]
        grams = _grams(zero, changing, group)
        for weight in changing:
            # each map counts once: of the ranks that hold a part or a copy of it, the first
            if weight.name in grams and weight.name.endswith(A) and (is_held_alone(weight) or group.rank() == 0):
                found = energies(grams[weight.name], grams[name_of_b(weight.name)])
                sums += torch.stack([found[: leading_values(weight.name, table, following)].sum(), found.sum()])
    dist.reduce(sums, 0)
    dist.broadcast(sums, 0)
    leading, total = sums.tolist()
    return leading / total if total else 1.0


def _grams(zero: ZeroState, factors: Sequence[Weight], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """A A^T and B^T B by canonical name, on the first replica alone; a collective call of all ranks of a stage."""
    found = {}
    for parameter, weights in by_parameter(factors).items():
        whole = zero.read(parameter, MASTER, owners=(0,))
        if replica_group(parameter).rank() > 0:
            continue
        for weight in weights:
            factor = weight.local(whole)
            rows = factor if weight.name.endswith(A) else factor.t()
            found[weight.name] = gram(rows, None if weight.is_whole else group)
    return found
