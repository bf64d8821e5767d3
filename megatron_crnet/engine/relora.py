"""ReLoRA's restart (arXiv 2307.05695), on fp32 masters and moments: every few steps, after the update,

    W += s A B,    A drawn anew,    B = 0,    most of the moments of A and B = 0

Adam's count of updates goes on, as in the authors' code. Each expert of a mixture has maps of its own. What is drawn
follows from the canonical weight and the restart's number alone, and magnitudes are compared over whole canonical
weights: every layout does the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_crnet.config.schema import ReloraConfig
from megatron_crnet.engine.state_kinds import MASTER, MOMENTS
from megatron_crnet.engine.zero import local_shape
from megatron_crnet.engine.zero_state import ZeroState
from megatron_crnet.model.experts import FrozenExpertGroup
from megatron_crnet.model.gpt import CRNetModel
from megatron_crnet.model.linear import FrozenGroup
from megatron_crnet.model.weights import Weight, by_parameter, canonical_generator, canonical_weights, initial_value


@torch.no_grad()
def restart(zero: ZeroState, chunks: Sequence[CRNetModel], config: ReloraConfig, seed: int, number: int) -> None:
    """Restart every low-rank map of this stage; a collective call.

    Args:
        seed: `training.seed`.
        number: of this restart, from 1, which no other restart of the run has.
    """
    steps = zero.steps
    zero.begin()
    for chunk in chunks:
        held = by_parameter(canonical_weights(chunk))
        for group in (module for module in chunk.modules() if isinstance(module, FrozenGroup | FrozenExpertGroup)):
            factors, frozen = [group.a, *group.stacks()], group.frozen_weight
            a, *stacks = (_read(zero, factor, MASTER) for factor in factors)
            zero.write(frozen, {MASTER: _read(zero, frozen, MASTER).add_(group.products(a, stacks))})
            for factor in factors:
                master = torch.zeros(local_shape(factor), device=zero.device)
                values = {MASTER: master, **{kind: _read(zero, factor, kind) for kind in MOMENTS}}
                for weight in held[factor]:
                    drawn = initial_value(weight.name, weight.shape, chunk.config, seed, number)
                    weight.local(master).copy_(weight.shard(drawn))
                    for kind in MOMENTS:
                        moment, name = weight.local(values[kind]), f"{kind}.{weight.name}@{number}"
                        whole = whole_weight(weight, moment, chunk.pg_collection.tp)
                        moment.copy_(weight.shard(pruned(whole, config, canonical_generator(name, seed))))
                zero.write(factor, values)
    zero.finish(steps)


def _read(zero: ZeroState, parameter: nn.Parameter, kind: str) -> Tensor:
    values = zero.read(parameter, kind)
    assert values is not None  # every replica is an owner
    return values


def whole_weight(weight: Weight, local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole of a canonical weight, from every tensor-parallel rank's shard; a collective call if it is split."""
    if weight.is_whole:
        return local
    whole = torch.zeros(weight.shape, device=local.device)
    weight.shard(whole).copy_(local)
    dist.all_reduce(whole, group=group)  # of zeros and one shard, so exact
    return whole


def pruned(moment: Tensor, config: ReloraConfig, generator: torch.Generator) -> Tensor:
    """A moment of a whole weight, of which `relora.prune` has zeroed a part.

    By magnitude, what is larger than the quantile `prune_share` of all magnitudes stays (`torch.quantile` takes at most
    2^24 elements, and `torch.kthvalue` has no deterministic form on CUDA).
    """
    if config.prune == "reset":
        return torch.zeros_like(moment)
    if config.prune == "random":
        stays = torch.rand(moment.shape, generator=generator) >= config.prune_share
        return moment * stays.to(moment.device)
    magnitudes = moment.abs().flatten()
    threshold = magnitudes.sort().values[int(config.prune_share * (magnitudes.numel() - 1))]
    return moment * (moment.abs() > threshold)
