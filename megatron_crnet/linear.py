"""The linear maps of a layer, grouped by their common input: {q, k, v}, {o}, {gate, up}, {down}.

A group multiplies its input once by all its A (one fused product), and the r-wide result by each B. Under
tensor parallelism only those r-wide results travel (docs/parallelism.md, "the 7r layout"):

    column groups (qkv, gate_up)   A replicated, z gathered along the sequence, B split over h_out
    row groups (o, down)           A split over h_in, z reduce-scattered along the sequence, B replicated

Shapes: s sequence, b batch, t tensor-parallel size; with sequence parallelism the input of a column group
and the output of a row group are [s/t, b, .], without it [s, b, .].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from megatron_crnet.cross_layer import cross_layer_residual
from megatron_crnet.low_rank_products import low_rank_products
from megatron_crnet.transformer_config import CRNetTransformerConfig

Outputs = tuple[Tensor, ...]

GROUPS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
ROW_GROUPS = ("o", "down")


@dataclass(frozen=True)
class Piece:
    """Where a canonical weight lives on this rank.

    Attributes:
        position: q, k, v, o, gate, up or down.
        suffix: `weight`, `a.weight`, `b.weight` or `beta`, as in the exported names.
        parameter: the local parameter that holds the shard.
        index: the part of `parameter` that is this weight's shard.
        shape: shape of the whole weight.
        shard_dim: dimension that is split over tensor-parallel ranks; None for a replicated weight.
    """

    position: str
    suffix: str
    parameter: nn.Parameter
    index: tuple[Any, ...]
    shape: tuple[int, ...]
    shard_dim: int | None


class LinearGroup(nn.Module):
    """Base of both kinds: which positions, their widths, and whether the group is a row group."""

    def __init__(self, config: CRNetTransformerConfig, group: str, pg_collection: ProcessGroupCollection) -> None:
        super().__init__()
        self.config = config
        self.group = group
        self.positions = GROUPS[group]
        self.is_row = group in ROW_GROUPS
        self.tp_group = pg_collection.tp
        self.tp_size = config.tensor_model_parallel_size
        self.h_in = int(config.ffn_hidden_size if group == "down" else config.hidden_size)
        self.h_out = [config.width(position) for position in self.positions]
        shards = 1 if self.is_row else self.tp_size
        self.local_out = [width // shards for width in self.h_out]

    def forward(self, x: Tensor, previous: Outputs | None) -> Outputs:
        """One output for each position. `previous` holds the same positions one layer below, or is None."""
        raise NotImplementedError

    def pieces(self) -> Iterator[Piece]:
        """Every canonical weight of the group."""
        raise NotImplementedError


class FullRankGroup(LinearGroup):
    """Full-rank maps by Megatron-Core's own parallel linear: X W for all positions in one product."""

    def __init__(self, config: CRNetTransformerConfig, group: str, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, group, pg_collection)
        common = {"config": config, "init_method": None, "bias": False, "skip_bias_add": False}
        if self.is_row:
            self.linear = RowParallelLinear(
                self.h_in, self.h_out[0], input_is_parallel=True, tp_group=self.tp_group, **common
            )
        else:
            self.linear = ColumnParallelLinear(
                self.h_in, sum(self.h_out), gather_output=False, tp_group=self.tp_group, **common
            )

    def forward(self, x: Tensor, previous: Outputs | None) -> Outputs:
        """X W; `previous` is not used."""
        y, _ = self.linear(x)
        return y.split(self.local_out, dim=-1)

    def pieces(self) -> Iterator[Piece]:
        """The maps, side by side in one parameter."""
        weight, start = self.linear.weight, 0
        for position, width, local in zip(self.positions, self.h_out, self.local_out, strict=True):
            rows = slice(start, start + local)
            yield Piece(position, "weight", weight, (rows,), (width, self.h_in), 1 if self.is_row else 0)
            start += local


class LowRankGroup(LinearGroup):
    """Low-rank maps: Y = X A B, plus s(beta) Y_prev for crnet, with silu between A and B for cola.

    Args:
        layer: number of the layer, from 0.
    """

    def __init__(
        self, config: CRNetTransformerConfig, group: str, pg_collection: ProcessGroupCollection, layer: int
    ) -> None:
        super().__init__(config, group, pg_collection)
        self.ranks = [config.ranks[layer][position] for position in self.positions]
        local_in = self.h_in // self.tp_size if self.is_row else self.h_in
        self.a = self._parameter(sum(self.ranks), local_in)
        # B matrices of one shape are one parameter and one batched product
        shapes = zip(self.local_out, self.ranks, strict=True)
        self.batches = [(shape, len(list(same))) for shape, same in groupby(shapes)]
        for index, (shape, count) in enumerate(self.batches):
            self.register_parameter(f"b{index}", self._parameter(count, *shape))
        beta = torch.full((len(self.positions),), config.beta_init, dtype=torch.float32, device=self.a.device)
        self.beta = nn.Parameter(beta) if config.has_previous(layer) else None
        self.beta_fp32: Tensor | None = None
        """Exact value of beta where the parameter itself had to be rounded to bf16 (ZeRO-3)."""
        self._mark_gradients()

    def _parameter(self, *shape: int) -> nn.Parameter:
        device = "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()
        return nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))

    def _mark_gradients(self) -> None:
        """Mark (as Megatron does) parameters whose gradient is a partial sum over tensor-parallel ranks."""
        replicated = [self.a] if not self.is_row else [getattr(self, f"b{i}") for i in range(len(self.batches))]
        for parameter in replicated:
            setattr(parameter, "sequence_parallel", self.config.sequence_parallel)  # noqa: B010
        if self.beta is not None:
            # a column group's outputs are always a shard, so its beta sees only a part even without SP
            partial = self.tp_size > 1 and (self.config.sequence_parallel or not self.is_row)
            setattr(self.beta, "sequence_parallel", partial)  # noqa: B010

    def forward(self, x: Tensor, previous: Outputs | None) -> Outputs:
        """X A B, plus what the variant adds."""
        return self.outputs(self.low_rank_output(x), previous)

    def low_rank_output(self, x: Tensor) -> Tensor:
        """z = X A, the quantity that is cheap to keep and to send: [s/t, b, sum of ranks] (SP) or [s, b, .]."""
        z = F.linear(x, self.a)
        if not self.is_row or self.tp_size == 1:
            return z
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(z, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(z, group=self.tp_group)

    def outputs(self, z: Tensor, previous: Outputs | None) -> Outputs:
        """Y of every position from z and the outputs one layer below."""
        if self.config.variant == "cola":
            z = F.silu(z)
        gather = not self.is_row and self.tp_size > 1 and self.config.sequence_parallel
        if not self.is_row and self.tp_size > 1 and not gather:
            z = copy_to_tensor_model_parallel_region(z, group=self.tp_group)
        b = [getattr(self, f"b{index}") for index in range(len(self.batches))]
        updates = low_rank_products(
            z, b, gather_group=self.tp_group if gather else None, overlap=self.config.overlap_tp_communication
        )
        if self.beta is None or previous is None:
            return updates
        return self._add_previous(updates, previous)

    def _add_previous(self, updates: Sequence[Tensor], previous: Outputs) -> Outputs:
        assert self.beta is not None
        eps = self.config.cross_layer_epsilon
        # value of the fp32 copy, gradient of the parameter
        beta = self.beta if self.beta_fp32 is None else self.beta_fp32 + (self.beta - self.beta.detach())
        betas = beta.unbind()
        return tuple(cross_layer_residual(*args, eps) for args in zip(updates, previous, betas, strict=True))

    def pieces(self) -> Iterator[Piece]:
        """Every A, B and beta."""
        start = 0
        for position, rank in zip(self.positions, self.ranks, strict=True):
            rows = slice(start, start + rank)
            yield Piece(position, "a.weight", self.a, (rows,), (rank, self.h_in), 1 if self.is_row else None)
            start += rank
        matrices = ((i, j) for i, (_, count) in enumerate(self.batches) for j in range(count))
        for position, width, rank, (i, j) in zip(self.positions, self.h_out, self.ranks, matrices, strict=True):
            shard_dim = None if self.is_row else 0
            yield Piece(position, "b.weight", getattr(self, f"b{i}"), (j,), (width, rank), shard_dim)
        if self.beta is not None:
            for index, position in enumerate(self.positions):
                yield Piece(position, "beta", self.beta, (index,), (), None)


def build_group(
    config: CRNetTransformerConfig, group: str, pg_collection: ProcessGroupCollection, layer: int
) -> LinearGroup:
    """The full-rank or low-rank form of a group, as the table of ranks says for layer `layer` (from 0)."""
    if config.is_full_rank(layer):
        return FullRankGroup(config, group, pg_collection)
    return LowRankGroup(config, group, pg_collection, layer)
