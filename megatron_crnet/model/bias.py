"""The biases of a group of linear maps, outside of the chain: a layer uses Y + bias, the next one's chain takes Y."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_crnet.config.architectures import Group
from megatron_crnet.config.megatron import CRNetTransformerConfig
from megatron_crnet.model.compiled import choose_glue
from megatron_crnet.model.linear import WeightShard, zero_parameter
from megatron_crnet.model.regions import Outputs, Regions


class GroupBias(nn.Module):
    """One bias per position, side by side in one parameter, cut over tensor-parallel ranks as the outputs are.

    The group before GELU gives GELU of that. Of a row group, whose outputs are sequence shards under sequence
    parallelism, the gradient is a partial sum there.
    """

    def __init__(self, config: CRNetTransformerConfig, group: Group, pg_collection: ProcessGroupCollection) -> None:
        super().__init__()
        table, self.positions, self.is_row, self.tp_group = config.table, group.names, group.is_row, pg_collection.tp
        self.h_out = [table.shapes[position][1] for position in self.positions]
        self.local_out = [table.local_shapes[position][1] for position in self.positions]
        self.activates = group in table.architecture.groups[2:3] and table.architecture.activation == "gelu"
        self.value = zero_parameter(config, sum(self.local_out))
        setattr(self.value, "sequence_parallel", self.is_row and config.sequence_parallel)  # noqa: B010
        self.regions = Regions(choose_glue(self.value, config.cross_layer_fusion), config.cross_layer_epsilon)

    def forward(self, betas: Tensor | None, *outputs: Tensor) -> tuple[Outputs, Outputs]:
        """What the layer uses of each position, [s, b, w]; and Y for the next layer, whose are the betas."""
        use = self.regions.gelu if self.activates else self.regions.carry
        return use(betas, self.value, *outputs)

    def shards(self) -> Iterator[WeightShard]:
        """Every bias; the rest of the parameter is padding, zeros that stay zeros."""
        start = 0
        for position, width, local in zip(self.positions, self.h_out, self.local_out, strict=True):
            first = 0 if self.is_row else local * self.tp_group.rank()
            span = range(first, min(first + local, width))
            index = (slice(start, start + len(span)),)
            dim = None if self.is_row else 0
            yield WeightShard(position, "bias", self.value, index, (width,), dim, range(0) if self.is_row else span)
            start += local
