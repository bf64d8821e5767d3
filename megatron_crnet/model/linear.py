"""The linear maps of a layer, grouped by their common input; in LLaMA {q, k, v}, {o}, {gate, up}, {down}.

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
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from megatron_crnet.config.megatron import CRNetTransformerConfig
from megatron_crnet.model.compiled import choose_glue
from megatron_crnet.model.glue import signed_scale
from megatron_crnet.model.lowrank import (
    ProductOptions,
    Reduction,
    gather_sequence,
    input_product,
    low_rank_outputs,
    previous_outputs,
)
from megatron_crnet.model.regions import Regions
from megatron_crnet.model.residual_product import choose_residual
from megatron_crnet.recompute.tape import Mode, Tape

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class WeightShard:
    """Where a canonical weight lives on this rank.

    Attributes:
        position: name of the position.
        suffix: `weight`, `a.weight`, `b.weight` or `beta`, as in the exported names.
        parameter: the local parameter that holds the shard.
        index: the part of `parameter` that is this weight's shard.
        shape: shape of the whole weight.
        shard_dim: dimension that is split over tensor-parallel ranks; None for a replicated weight.
        span: elements of that dimension that this rank holds, if it is split.
    """

    position: str
    suffix: str
    parameter: nn.Parameter
    index: tuple[Any, ...]
    shape: tuple[int, ...]
    shard_dim: int | None = None
    span: range = range(0)


def zero_parameter(config: CRNetTransformerConfig, *shape: int) -> nn.Parameter:
    """A parameter of zeros, in the configuration's dtype, on its device: padding stays so (`model/weights.py`)."""
    return nn.Parameter(torch.zeros(shape, dtype=config.params_dtype, device=config.initial_device))


class LinearGroup(nn.Module):
    """Base of both kinds: which positions, their widths, and whether the group is a row group."""

    def __init__(self, config: CRNetTransformerConfig, group: str, pg_collection: ProcessGroupCollection) -> None:
        super().__init__()
        self.config = config
        self.group = group
        of_group = config.table.architecture.group(group)
        self.positions = [position.name for position in of_group.positions]
        self.is_row = of_group.is_row
        self.tp_group = pg_collection.tp
        self.tp_size = config.tensor_model_parallel_size
        table = config.table
        self.h_in, self.local_in = table.shapes[self.positions[0]][0], table.local_shapes[self.positions[0]][0]
        self.h_out = [table.shapes[position][1] for position in self.positions]
        self.local_out = [table.local_shapes[position][1] for position in self.positions]

    def forward(self, x: Tensor, previous: Outputs | None, tape: Tape | None = None) -> Outputs:
        """One output per position; `previous` holds the previous layer's, or is None.

        With `tape`, the call is recorded there or does what the tape's mode says (`recompute/tape.py`).
        """
        raise NotImplementedError

    def rebuild(self, tape: Tape, previous: Outputs | None) -> Outputs:
        """A low-rank group's outputs, the same bits, from the z on the tape, which is in mode REBUILD."""
        # a call of the module, as ZeRO-3's hooks gather its parameters
        return self(tape.saved(), previous, tape)

    def invert(self, tape: Tape, outputs: Outputs) -> tuple[Outputs, Tensor]:
        """The previous layer's outputs, to rounding, and s(beta) of each position; the tape is in mode INVERT."""
        *previous, scales = self(tape.saved(), outputs, tape)
        return tuple(previous), scales

    def shards(self) -> Iterator[WeightShard]:
        """Every canonical weight of the group; the rest of its parameters is padding, zeros that stay zeros."""
        raise NotImplementedError

    def _matrix(
        self,
        position: str,
        suffix: str,
        parameter: nn.Parameter,
        shape: tuple[int, int],
        split: tuple[int, int] | None,
        start: int = 0,
        stack: tuple[int, ...] = (),
    ) -> WeightShard:
        """The shard of a matrix that begins at row `start` of `parameter[stack]`.

        Args:
            split: the dimension that is split, and its size on each rank with padding.
        """
        held, span = list(shape), range(0)
        if split is not None:
            dim, local = split
            first = local * self.tp_group.rank()
            span = range(first, min(first + local, shape[dim]))
            held[dim] = len(span)
        index = (*stack, slice(start, start + held[0]), slice(held[1]))
        return WeightShard(position, suffix, parameter, index, shape, split and split[0], span)


class FullRankGroup(LinearGroup):
    """Full-rank maps by Megatron-Core's own parallel linear: X W for all positions in one product."""

    def __init__(self, config: CRNetTransformerConfig, group: str, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, group, pg_collection)
        common = {"config": config, "init_method": None, "bias": False, "skip_bias_add": False}
        if self.is_row:
            self.linear = RowParallelLinear(
                self.local_in * self.tp_size, self.h_out[0], input_is_parallel=True, tp_group=self.tp_group, **common
            )
        else:
            self.linear = ColumnParallelLinear(
                self.h_in, sum(self.local_out) * self.tp_size, gather_output=False, tp_group=self.tp_group, **common
            )
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, previous: Outputs | None, tape: Tape | None = None) -> Outputs:
        """X W; `previous` is not used."""
        if tape is None or not tape.saves_graph:
            return self._products(x)
        return tape.call(self._products, x)

    def _products(self, x: Tensor) -> Outputs:
        y, _ = self.linear(x)
        # backward of a split copies even the only part
        return y.split(self.local_out, dim=-1) if len(self.local_out) > 1 else (y,)

    def shards(self) -> Iterator[WeightShard]:
        """The maps, side by side in one parameter."""
        weight, start = self.linear.weight, 0
        for position, width, local in zip(self.positions, self.h_out, self.local_out, strict=True):
            split = (1, self.local_in) if self.is_row else (0, local)
            yield self._matrix(position, "weight", weight, (width, self.h_in), split, start)
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
        self.layer = layer
        self.ranks = [config.table.ranks[layer][position] for position in self.positions]
        self.padded_ranks = [config.table.padded_ranks[layer][position] for position in self.positions]
        self.a = zero_parameter(config, sum(self.padded_ranks), self.local_in)
        # B matrices of one shape are one parameter
        shapes = zip(self.local_out, self.padded_ranks, strict=True)
        self.batches = [(shape, len(list(same))) for shape, same in groupby(shapes)]
        for index, (shape, count) in enumerate(self.batches):
            self.register_parameter(f"b{index}", zero_parameter(config, count, *shape))
        beta = torch.full((len(self.positions),), config.beta_init, dtype=torch.float32, device=self.a.device)
        self.beta = nn.Parameter(beta) if config.table.has_previous(layer) else None
        fusion = config.cross_layer_fusion
        has_residual = self.beta is not None
        residual = choose_residual(self.a, [shape for shape, _ in self.batches], fusion) if has_residual else None
        self.regions = Regions(choose_glue(self.a, fusion), config.cross_layer_epsilon, residual=residual)
        self.receives = True
        """The previous layer does not scale the gradients of its outputs: that is done here."""
        self.beta_fp32: Tensor | None = None
        """Exact value of beta where the parameter itself had to be rounded to bf16 (ZeRO-3)."""
        self._mark_gradients()

    def _mark_gradients(self) -> None:
        """Mark (as Megatron does) parameters whose gradient is a partial sum over tensor-parallel ranks."""
        replicated = [self.a] if not self.is_row else [getattr(self, f"b{i}") for i in range(len(self.batches))]
        for parameter in replicated:
            setattr(parameter, "sequence_parallel", self.config.sequence_parallel)  # noqa: B010
        if self.beta is not None:
            # a column group's outputs are always a shard, so its beta sees only a part even without SP
            partial = self.tp_size > 1 and (self.config.sequence_parallel or not self.is_row)
            setattr(self.beta, "sequence_parallel", partial)  # noqa: B010

    def forward(self, x: Tensor, previous: Outputs | None, tape: Tape | None = None) -> Outputs:
        """X A B, plus what the variant adds."""
        if tape is not None and tape.mode in (Mode.REBUILD, Mode.INVERT):
            return self._from_z(x, previous, tape)
        z = self._entering(self.low_rank_output(x, tape))
        if tape is not None and tape.mode is Mode.REPLAY and tape.outputs is None:
            # the product is repeated; its backward needs the same z
            self._gather(z, tape)
        betas = self.exact_betas() if previous is not None else None
        if betas is not None and previous is not None and self.receives:
            previous = self.regions.receive(betas, previous)
        values = betas.detach() if betas is not None else None
        return low_rank_outputs(z, self.stacks(), values, previous, self._options(tape))

    def low_rank_output(self, x: Tensor, tape: Tape | None = None) -> Tensor:
        """z = X A, the quantity that is cheap to keep and to send: [s/t, b, sum of ranks] (SP) or [s, b, .]."""
        reduces = self.is_row and self.tp_size > 1
        reduction = Reduction(self.tp_group, self.config.sequence_parallel) if reduces else None
        if tape is not None and tape.mode is Mode.REPLAY:
            return input_product(x, self.a, reduction, known=tape.saved())
        z = input_product(x, self.a, reduction)
        if tape is not None:
            tape.save(z)
        return z

    @torch.no_grad()
    def _from_z(self, z: Tensor, given: Outputs | None, tape: Tape) -> Outputs:
        """For `rebuild` and `invert`: Y from that of the previous layer, or that (and s(beta)) from Y."""
        z, options = self._gather(self._entering(z), tape), self._options(tape)
        betas = self.exact_betas() if given is not None else None
        if tape.mode is Mode.REBUILD:
            return low_rank_outputs(z, self.stacks(), betas, given, options)
        assert betas is not None
        assert given is not None
        previous = previous_outputs(z, self.stacks(), betas, given, options)
        return *previous, signed_scale(betas, self.regions.eps)

    def _gather(self, z: Tensor, tape: Tape) -> Tensor:
        """z itself; where products gather it, that is done once for this and for the gradient of B."""
        if self._gathers:
            tape.gathered, _ = gather_sequence(z.detach(), self.tp_group)
        return z

    def _entering(self, z: Tensor) -> Tensor:
        """What B multiplies, up to a gather."""
        if self.config.table.method.has_silu:
            z = F.silu(z)
        if self.config.table.scale != 1:
            z = z * self.config.table.scale
        if not self.is_row and self.tp_size > 1 and not self._gathers:
            return copy_to_tensor_model_parallel_region(z, group=self.tp_group)
        return z

    @property
    def _gathers(self) -> bool:
        return not self.is_row and self.tp_size > 1 and self.config.sequence_parallel

    def _options(self, tape: Tape | None) -> ProductOptions:
        return ProductOptions(
            gather_group=self.tp_group if self._gathers else None,
            overlap=self.config.overlap_tp_communication,
            regions=self.regions,
            known=tape.outputs if tape is not None else None,
            gathered=tape.gathered if tape is not None else None,
        )

    def stacks(self) -> list[nn.Parameter]:
        """The parameters that hold B, [n, w, r] each."""
        return [getattr(self, f"b{index}") for index in range(len(self.batches))]

    def exact_betas(self) -> Tensor | None:
        """The beta of every position, fp32."""
        if self.beta is None or self.beta_fp32 is None:
            return self.beta if self.beta is None else self.beta.float()
        # value of the fp32 copy, gradient of the parameter
        return self.beta_fp32 + (self.beta - self.beta.detach())

    def shards(self) -> Iterator[WeightShard]:
        """Every A, B and beta."""
        start = 0
        for position, rank, room in zip(self.positions, self.ranks, self.padded_ranks, strict=True):
            split = (1, self.local_in) if self.is_row else None
            yield self._matrix(position, "a.weight", self.a, (rank, self.h_in), split, start)
            start += room
        matrices = ((i, j) for i, (_, count) in enumerate(self.batches) for j in range(count))
        of_positions = zip(self.positions, self.h_out, self.local_out, self.ranks, matrices, strict=True)
        for position, width, local, rank, (i, j) in of_positions:
            split = None if self.is_row else (0, local)
            yield self._matrix(position, "b.weight", getattr(self, f"b{i}"), (width, rank), split, stack=(j,))
        if self.beta is not None:
            for index, position in enumerate(self.positions):
                yield WeightShard(position, "beta", self.beta, (index,), ())


class FrozenGroup(LowRankGroup):
    """ReLoRA's maps: Y = X W + s X A B, W frozen and cut as a full-rank group's, A and B as a low-rank group's."""

    def __init__(
        self, config: CRNetTransformerConfig, group: str, pg_collection: ProcessGroupCollection, layer: int
    ) -> None:
        super().__init__(config, group, pg_collection, layer)
        self.frozen = FullRankGroup(config, group, pg_collection).requires_grad_(False)

    @property
    def frozen_weight(self) -> nn.Parameter:
        """W of all positions, [sum of w, h_in]."""
        weight: nn.Parameter = self.frozen.linear.weight
        return weight

    def forward(self, x: Tensor, previous: Outputs | None, tape: Tape | None = None) -> Outputs:
        """X W + s X A B; `previous` is not used. Nothing is recorded: W needs X again."""
        z = self._entering(self.low_rank_output(x))
        return low_rank_outputs(z, self.stacks(), None, self.frozen(x, None), self._options(None))

    def shards(self) -> Iterator[WeightShard]:
        """Every A, B and W."""
        yield from super().shards()
        yield from self.frozen.shards()

    @torch.no_grad()
    def products(self, a: Tensor, stacks: Sequence[Tensor]) -> Tensor:
        """s A B of every position, as W lies in its parameter.

        Args:
            a, stacks: values of `a` and of the stacks of B.
        """
        parts = a.split(self.padded_ranks)
        matrices = (b for stack in stacks for b in stack)
        return torch.cat([self.config.table.scale * (b @ part) for b, part in zip(matrices, parts, strict=True)])


def build_group(
    config: CRNetTransformerConfig, group: str, pg_collection: ProcessGroupCollection, layer: int
) -> LinearGroup:
    """The form of a group that the table says for layer `layer` (from 0): full rank, or the method's."""
    if config.table.is_full_rank(layer):
        return FullRankGroup(config, group, pg_collection)
    made = FrozenGroup if config.table.method.has_frozen else LowRankGroup
    return made(config, group, pg_collection, layer)
