"""A mixture of experts: Megatron-Core's router and dispatcher, and the experts of this rank.

An expert is down(silu(gate x) up x); no chain passes through it (docs/decisions/experts.md). The weights of a rank's
experts are stacked, [experts, out, in], and all positions of a group share a product with A, as in `model/linear.py`.
Experts are not cut: with expert parallelism each rank holds whole ones of its own, whose gradients are whole, or with
several groups of such ranks summed over these; otherwise every rank holds all and gives them the tokens of its part of
the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_crnet.config.architectures import Group
from megatron_crnet.config.experts_rules import spans_replicas
from megatron_crnet.config.megatron import CRNetTransformerConfig
from megatron_crnet.model.compiled import choose_glue
from megatron_crnet.model.linear import WeightShard, zero_parameter
from megatron_crnet.model.regions import Regions
from megatron_crnet.model.stacked import stacked_product

OF_A_PASS = {"local_map", "local_probs", "probs", "routing_map", "reversed_local_input_permutation_mapping"}
"""Tensors that Megatron-Core's dispatchers would keep until the next pass."""


class CountingRouter(TopKRouter):
    """Megatron-Core's router, which keeps what is logged: of passes with a gradient, so of each micro-batch once."""

    def __init__(self, config: CRNetTransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.reset_counts()

    def reset_counts(self) -> None:
        """Forget what was counted."""
        self.tokens_per_expert = torch.zeros(self.num_experts, dtype=torch.float64)
        self.balance_loss = torch.zeros(1, dtype=torch.float64)

    def gating(self, input: Tensor) -> Tensor:  # noqa: A002
        """Logits in fp32: Megatron-Core 0.16.1 names a function of Transformer Engine here also where there is none."""
        return F.linear(input.float(), self.weight.float())

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: A002
        """Weights of experts and which are chosen, [tokens, experts]."""
        weights, chosen = super().forward(input, padding_mask)
        if self.training and torch.is_grad_enabled():
            self.tokens_per_expert = self.tokens_per_expert.to(chosen.device) + chosen.sum(0)
        return weights, chosen

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *args: Any, **options: Any
    ) -> Tensor:
        """Have backward differentiate this rank's part of the load-balancing loss, and count it."""
        self.balance_loss = self.balance_loss.to(aux_loss.device) + aux_loss.detach() / aux_loss_coeff
        return super().attach_and_log_load_balancing_loss(activation, aux_loss_coeff, aux_loss, *args, **options)


class ExpertGroup(nn.Module):
    """Maps with a common input of all experts of this rank: X W, X A B, or for cola silu(X A) B.

    Args:
        layer: number of the layer, from 0.
        count: experts of this rank.
        first: number of the first of them.
    """

    def __init__(self, config: CRNetTransformerConfig, group: Group, layer: int, count: int, first: int) -> None:
        super().__init__()
        table, self.positions, self.count, self.first = config.table, group.names, count, first
        self.config, self.is_spread = config, config.expert_model_parallel_size > 1
        self.h_in, self.h_out = table.shapes[group.names[0]][0], [table.shapes[p][1] for p in group.names]
        self.is_full_rank, self.has_silu = table.is_full_rank(layer, group.names[0]), table.method.has_silu
        self.ranks = [table.ranks[layer][p] for p in group.names]
        self.padded_ranks = [table.padded_ranks[layer][p] for p in group.names]
        if self.is_full_rank:
            self.weight = self._parameter(sum(self.h_out), self.h_in)
            return
        self.a = self._parameter(sum(self.padded_ranks), self.h_in)
        for index, (width, rank) in enumerate(zip(self.h_out, self.padded_ranks, strict=True)):
            self.register_parameter(f"b{index}", self._parameter(width, rank))

    def _parameter(self, *shape: int) -> nn.Parameter:
        parameter = zero_parameter(self.config, self.count, *shape)
        # an expert that every rank holds is given a part of the sequence by each
        partial = self.config.sequence_parallel and not self.is_spread
        setattr(parameter, "sequence_parallel", partial)  # noqa: B010
        if spans_replicas(self.config):
            setattr(parameter, "allreduce", False)  # noqa: B010  (Megatron-Core's and DeepSpeed's mark of experts)
        return parameter

    def forward(self, x: Tensor, ends: Tensor, scale: Tensor | float | None = None) -> tuple[Tensor, ...]:
        """One output [tokens, w] per position.

        Args:
            x: tokens of the first expert, then of the next, [tokens, h_in].
            ends: as in `stacked_product`.
            scale: what outputs are multiplied by, a number or [tokens, 1]; done where there are fewest elements.
        """
        if self.is_full_rank:
            return stacked_product(_scaled(x, scale), self.weight, ends).split(self.h_out, dim=-1)
        z = stacked_product(x, self.a, ends)
        parts = _scaled(F.silu(z) if self.has_silu else z, scale).split(self.padded_ranks, dim=-1)
        return tuple(stacked_product(part, b, ends) for part, b in zip(parts, self.stacks(), strict=True))

    def stacks(self) -> list[nn.Parameter]:
        """B of each position, [experts, w, r]."""
        return [getattr(self, f"b{index}") for index in range(len(self.positions))]

    def shards(self) -> Iterator[tuple[int, WeightShard]]:
        """Every map of every expert of this rank, with the expert's number; the rest of the parameters is padding."""
        for local in range(self.count):
            for shard in self._shards(local):
                yield self.first + local, shard

    def _shards(self, local: int) -> Iterator[WeightShard]:
        if self.is_full_rank:
            yield from self._dense_shards(self.weight, local)
            return
        row, sizes = 0, zip(self.positions, self.h_out, self.ranks, self.padded_ranks, self.stacks(), strict=True)
        for position, width, rank, room, b in sizes:
            yield self._matrix(position, "a.weight", self.a, local, row, (rank, self.h_in))
            yield self._matrix(position, "b.weight", b, local, 0, (width, rank))
            row += room

    def _dense_shards(self, weight: nn.Parameter, local: int) -> Iterator[WeightShard]:
        """The full-rank maps of an expert, one below the other in a parameter."""
        start = 0
        for position, width in zip(self.positions, self.h_out, strict=True):
            yield self._matrix(position, "weight", weight, local, start, (width, self.h_in))
            start += width

    def _matrix(
        self, position: str, suffix: str, parameter: nn.Parameter, local: int, start: int, shape: tuple[int, int]
    ) -> WeightShard:
        index = (local, slice(start, start + shape[0]), slice(shape[1]))
        # an expert of one rank alone is a shard that is all of the weight
        dim, span = (0, range(shape[0])) if self.is_spread else (None, range(0))
        return WeightShard(position, suffix, parameter, index, shape, dim, span)


class FrozenExpertGroup(ExpertGroup):
    """ReLoRA's maps of each expert: X W + s X A B, W frozen."""

    def __init__(self, config: CRNetTransformerConfig, group: Group, layer: int, count: int, first: int) -> None:
        super().__init__(config, group, layer, count, first)
        self.frozen_weight = self._parameter(sum(self.h_out), self.h_in)
        self.frozen_weight.requires_grad_(False)

    def forward(self, x: Tensor, ends: Tensor, scale: Tensor | float | None = None) -> tuple[Tensor, ...]:
        """See the base."""
        s = self.config.table.scale
        added = super().forward(x, ends, s if scale is None else s * scale)
        outputs = stacked_product(_scaled(x, scale), self.frozen_weight, ends).split(self.h_out, dim=-1)
        return tuple(y + change for y, change in zip(outputs, added, strict=True))

    def _shards(self, local: int) -> Iterator[WeightShard]:
        yield from super()._shards(local)
        yield from self._dense_shards(self.frozen_weight, local)

    @torch.no_grad()
    def products(self, a: Tensor, stacks: Sequence[Tensor]) -> Tensor:
        """s A B of every expert and position, as W lies in its parameter.

        Args:
            a, stacks: values of `a` and of `stacks()`.
        """
        parts = a.split(self.padded_ranks, dim=1)
        return torch.cat([self.config.table.scale * (b @ part) for b, part in zip(stacks, parts, strict=True)], dim=1)


class Experts(nn.Module):
    """The experts of a layer on this rank, as `MoELayer` builds and calls them."""

    def __init__(
        self, count: int, config: CRNetTransformerConfig, layer: int, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__()
        experts = config.table.architecture.experts
        assert experts is not None
        first = pg_collection.ep.rank() * count
        is_full_rank = config.table.is_full_rank(layer, experts.positions[0].name)
        is_frozen = config.table.method.has_frozen and not is_full_rank
        made = FrozenExpertGroup if is_frozen else ExpertGroup
        self.inputs, self.output = (made(config, group, layer, count, first) for group in experts.groups)
        # compiled functions have fixed shapes: all tokens of a rank, k times, but of other ranks any number may come
        fusion = config.cross_layer_fusion and config.expert_model_parallel_size == 1
        glue = choose_glue(next(self.parameters()), fusion)
        self.regions = Regions(glue, activates=config.table.activates)

    def forward(self, x: Tensor, counts: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """What the tokens' experts give, times their weights, [tokens, h]; and no bias.

        Args:
            x: [tokens, h], by expert.
            counts: tokens of each expert, [experts].
            weights: of the tokens, [tokens].
        """
        ends = counts.to(x.device, non_blocking=True).cumsum(0, dtype=torch.int32)
        hidden, _ = self.regions.swiglu(None, *self.inputs(x, ends))
        (y,) = self.output(hidden, ends, weights[:, None])
        return y, None

    def shards(self) -> Iterator[tuple[int, WeightShard]]:
        """Every map of every expert of this rank, with the expert's number."""
        yield from self.inputs.shards()
        yield from self.output.shards()


def _scaled(x: Tensor, scale: Tensor | float | None) -> Tensor:
    return x if scale is None else (x * scale).to(x.dtype)


class ExpertLayer(MoELayer):
    """Megatron-Core's layer, whose dispatcher lets go of a pass when it is over.

    The weights that it would keep until the next pass have a graph, and where layers are recomputed that graph begins
    at the layer's inputs: X, every Y and their gradients would stay alive in each layer until the next micro-batch.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """See the base."""
        found = super().forward(*args, **kwargs)
        for name in vars(self.token_dispatcher).keys() & OF_A_PASS:
            setattr(self.token_dispatcher, name, None)
        return found


def build_experts(config: CRNetTransformerConfig, layer: int, pg_collection: ProcessGroupCollection) -> MoELayer:
    """Router, dispatcher and experts of layer `layer` (from 0)."""
    experts = ModuleSpec(module=Experts, params={"layer": layer})
    # its number is not set: Megatron-Core would then add up losses in a dictionary of the process
    return ExpertLayer(config, MoESubmodules(experts=experts, router=CountingRouter), pg_collection=pg_collection)
