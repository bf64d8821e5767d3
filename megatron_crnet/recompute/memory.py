"""What one layer remembers of its forward pass for the recomputation in backward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from megatron_crnet.config.positions import GROUPS
from megatron_crnet.recompute.random_states import RandomStates
from megatron_crnet.recompute.saved_subgraph import Fragment


@dataclass
class GroupMemory:
    """What a linear group knows when its layer is recomputed; empty while the forward pass is recorded.

    Attributes:
        kept: z, the low-rank outputs [s/t, b, sum of ranks], once recorded: no product with A is repeated.
        outputs: the group's outputs, rebuilt: no product with B is repeated.
        gathered: z over the whole sequence, gathered while rebuilding: not sent twice.
        scale: s(beta) of the positions, once used to go down a layer.
        keep_graph: a full-rank group keeps the graph of its product, because its outputs will be known.
        fragment: that graph.
    """

    kept: list[Tensor] = field(default_factory=list)
    outputs: tuple[Tensor, ...] | None = None
    gathered: Tensor | None = None
    scale: Tensor | None = None
    keep_graph: bool = False
    fragment: Fragment | None = None

    @property
    def z(self) -> Tensor | None:
        """The low-rank outputs, if there are any."""
        return self.kept[0] if self.kept else None


@dataclass
class LayerMemory:
    """The memory of one layer, one micro-batch.

    Attributes:
        keep_attention_output: attention's output and what its backward needs are kept, not recomputed.
        draws: dropout is active, so random states are remembered.
        groups: by the name of the linear group.
        attention: attention's graph, when kept.
        growth: |Y_l| / |Y_{l-1}| by position, where the layer may be inverted.
        random: states of the generators before each draw.
    """

    keep_attention_output: bool
    draws: bool
    groups: dict[str, GroupMemory]
    attention: Fragment | None = None
    growth: Tensor | None = None
    random: dict[str, RandomStates] = field(default_factory=dict)

    def drawing(self, point: str) -> AbstractContextManager[None]:
        """Context of a draw: the first time its random state is remembered, then it is repeated."""
        if not self.draws:
            return nullcontext()
        if point in self.random:
            return self.random[point].replay()
        self.random[point] = RandomStates.capture()
        return nullcontext()

    def kept(self) -> dict[str, list[Tensor]]:
        """Every list of kept tensors by name, so that they can be taken away and put back."""
        lists = {name: group.kept for name, group in self.groups.items()}
        return {**lists, "attention": self.attention.kept} if self.attention is not None else lists

    def know(self, outputs: Sequence[Tensor]) -> None:
        """The outputs of all positions, in the order of LayerOutputs: no product will be repeated."""
        known = iter(outputs)
        for name, positions in GROUPS.items():
            self.groups[name].outputs = tuple(islice(known, len(positions)))

    def scales(self) -> Tensor:
        """s(beta) of all positions."""
        return torch.cat([group.scale for group in self.groups.values() if group.scale is not None])
