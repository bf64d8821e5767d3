"""What a layer's forward pass saves for its recomputation in backward.

A segment records one tape per layer without an autograd graph, and plays it in backward:

    RECORD    operations compute, and save what backward needs
    REBUILD   outputs of linear groups again, from their saved z and the previous layer's outputs
    INVERT    the previous layer's outputs, from the saved z and this layer's outputs
    REPLAY    operations run once more, now with a graph; what is saved or has been rebuilt is not computed again
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum, auto

from torch import Tensor

from megatron_crnet.config.megatron import CRNetTransformerConfig
from megatron_crnet.recompute.rng import RngStates
from megatron_crnet.recompute.saved_subgraph import SavedSubgraph

LayerOutputs = tuple[Tensor, ...]
"""The linear outputs Y^P of a layer, one per position of its architecture, before RoPE and activation functions.

Of column groups [s, b, h_out/t]; of row groups [s/t, b, h_out] with sequence parallelism, [s, b, h_out] without.
"""


class Mode(Enum):
    """What a call with a tape does."""

    RECORD = auto()
    REBUILD = auto()
    INVERT = auto()
    REPLAY = auto()


@dataclass
class Tape:
    """The part of one operation: a linear group, or attention.

    Attributes:
        saves_graph: the operation saves its own autograd graph instead of tensors (`call`).
        outputs: the operation's outputs, once they have been rebuilt: no product with B is repeated.
        gathered: z over the whole sequence, once it has been gathered: it is not sent twice.
    """

    saves_graph: bool = False
    mode: Mode = Mode.RECORD
    outputs: tuple[Tensor, ...] | None = None
    gathered: Tensor | None = None
    _tensors: list[Tensor] = field(default_factory=list)
    _subgraph: SavedSubgraph | None = None

    def save(self, tensor: Tensor) -> None:
        """Save a tensor, such as the low-rank outputs z [s/t, b, sum of ranks]; while recording."""
        assert self.mode is Mode.RECORD
        self._tensors.append(tensor.detach())

    def saved(self) -> Tensor:
        """The saved tensor."""
        (tensor,) = self._tensors
        return tensor

    def call(
        self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, keep_outputs: bool = False
    ) -> tuple[Tensor, ...]:
        """Outputs of `function(*inputs)`, which runs only while recording; its graph serves backward.

        Args:
            keep_outputs: save the outputs, too; otherwise they have to be set before the replay.
        """
        if self.mode is Mode.RECORD:
            outputs, self._subgraph = SavedSubgraph.record(function, *inputs, keep_outputs=keep_outputs)
            return outputs
        assert self._subgraph is not None
        known = self._subgraph.kept_outputs() if keep_outputs else self.outputs
        assert known is not None
        return self._subgraph.resume(known, *inputs)

    @property
    def tensors(self) -> list[Tensor]:
        """Every saved tensor; they may be replaced in place, in order, to move them away and back."""
        return self._subgraph.kept if self._subgraph is not None else self._tensors


class LayerTape:
    """The tape of one layer, one micro-batch.

    Args:
        outputs_known: the layer's outputs will be known when it is replayed, so full-rank groups save their graphs.
        rebuilds_stream: the residual stream that leaves the layer will be rebuilt.

    Attributes:
        groups: by the name of the linear group.
        attention: of core attention.
        experts: of a mixture of experts, which saves what it gave where `rebuilds_stream`.
    """

    def __init__(self, config: CRNetTransformerConfig, *, outputs_known: bool, rebuilds_stream: bool = False) -> None:
        self.mode, self.rebuilds_stream = Mode.RECORD, rebuilds_stream
        self._architecture = config.table.architecture
        self.groups = {group.name: Tape(saves_graph=outputs_known) for group in self._architecture.groups}
        self.attention = Tape(saves_graph=config.recompute_keep_attention_output)
        self.experts = Tape()
        self._has_dropout = config.has_dropout
        self._rng: dict[str, RngStates] = {}

    def enter(self, mode: Mode) -> LayerTape:
        """From now on calls do what `mode` says. Returns the tape itself."""
        self.mode = mode
        for tape in (self.attention, self.experts, *self.groups.values()):
            tape.mode = mode
        return self

    def rng_scope(self, point: str) -> AbstractContextManager[None]:
        """Context of a random operation: its RNG states are saved while recording and set again afterwards."""
        if not self._has_dropout:
            return nullcontext()
        if self.mode is not Mode.RECORD:
            return self._rng[point].scope()
        self._rng[point] = RngStates.capture()
        return nullcontext()

    def tensors(self) -> dict[str, list[Tensor]]:
        """`Tape.tensors` by the operation's name."""
        others = {"attention": self.attention.tensors, "experts": self.experts.tensors}
        return {**{name: group.tensors for name, group in self.groups.items()}, **others}

    def set_outputs(self, outputs: LayerOutputs) -> None:
        """Set the outputs of all groups: no product is repeated."""
        for name, of_group in self._architecture.by_group(outputs).items():
            self.groups[name].outputs = of_group
