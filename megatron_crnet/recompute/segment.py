"""Activation recomputation of a run of layers: forward without a graph, backward layer by layer.

Three strategies, by what a segment keeps and how backward gets the rest (docs/recomputation.md):

    full      keeps X and Y where it starts; runs the layers again
    replay    also every layer's z; rebuilds X and Y upward with the forward pass's own operations
    inverse   X and z of every layer and Y at both ends; rebuilds Y downward, Y_{l-1} = (Y_l - z B) / s

Under `replay` and `inverse`, one layer at a time then repeats its norms, RoPE, attention and SwiGLU with a graph,
in which the products that are known already only hand their values on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_crnet.config.megatron import CRNetTransformerConfig
from megatron_crnet.config.positions import GROUPS, LayerOutputs
from megatron_crnet.recompute.memory import GroupMemory, LayerMemory
from megatron_crnet.recompute.planner import amplification_limit, errors_below
from megatron_crnet.recompute.random_states import RandomStates
from megatron_crnet.recompute.storage import ActivationStore, StoredTensors

DRIFT = 2.0
"""How far the estimated error of a pass may be above the one its anchors were placed for."""

Grads = Sequence[Tensor | None]
LayerState = tuple[Tensor, LayerOutputs | None, LayerOutputs | None]
"""Residual stream that enters a layer, outputs of the layer below, its own outputs (None: not known)."""


class Layer(Protocol):
    """What recomputation asks of a layer, such as `model.layer.CRNetTransformerLayer`, where each is documented."""

    index: int
    returns_outputs: bool

    def __call__(
        self, hidden_states: Tensor, *, context: LayerOutputs | None, memory: LayerMemory | None = None, **shared: Any
    ) -> tuple[Tensor, LayerOutputs | None]:
        """The layer's forward pass; with `memory` it is recorded or repeated, and outputs are returned."""

    def rebuild(
        self, hidden_states: Tensor, context: LayerOutputs | None, memory: LayerMemory
    ) -> tuple[Tensor, LayerOutputs | None]:
        """What the forward pass returned, from the low-rank outputs in `memory`."""

    def outputs_below(self, outputs: LayerOutputs, memory: LayerMemory) -> LayerOutputs:
        """The previous layer's outputs, from this layer's."""


class Boundary:
    """X, and Y where a chain passes, at the start of a segment: kept once, used by the segments on both sides."""

    def __init__(self, store: ActivationStore, hidden_states: Tensor | None, outputs: LayerOutputs | None) -> None:
        tensors = {"x": hidden_states, **(outputs._asdict() if outputs is not None else {})}
        named = {name: x for name, x in tensors.items() if x is not None}
        self._stored: StoredTensors | None = store.keep(named, replicated=("x", "o", "down"))
        self._restored: dict[str, Tensor] = {}

    def _restore(self) -> dict[str, Tensor]:
        if self._stored is not None:
            # brought to the device once, by the segment above
            self._restored, self._stored = self._stored.restore(), None
        return self._restored

    @property
    def hidden_states(self) -> Tensor:
        """The residual stream X."""
        return self._restore()["x"]

    @property
    def outputs(self) -> LayerOutputs | None:
        """The outputs Y of the layer below, None where a chain starts."""
        found = self._restore()
        return LayerOutputs(*(found[name] for name in LayerOutputs._fields)) if "q" in found else None


class SegmentRun:
    """One pass of one micro-batch through one segment, from its forward pass to its backward pass.

    Args:
        layers: the segment's layers.
        store: where kept tensors live.
        shared: arguments that every layer is called with; they are not put away, as there is one of them for all.
        last: no segment of this stage follows.
        growth: where `inverse` notes the sizes of outputs (`CRNetTransformerBlock.growth`).
    """

    def __init__(
        self,
        config: CRNetTransformerConfig,
        layers: Sequence[Layer],
        store: ActivationStore,
        shared: Mapping[str, Any],
        last: bool,
        growth: dict[int, Tensor],
    ) -> None:
        self.config, self.layers, self.store, self.shared = config, layers, store, shared
        self.strategy = config.recompute_strategy
        self.draws = config.has_dropout
        self.last, self.growth = last, growth
        self.memories: list[LayerMemory] = []
        self.start: Boundary
        self.end: Boundary | None = None
        """Where the next segment starts, or this stage's last anchor."""
        self._stored = StoredTensors({})
        self._streams: list[Tensor] = []
        self._random: RandomStates | None = None
        self._beyond_tolerance: Tensor | None = None

    def __call__(self, hidden_states: Tensor, context: LayerOutputs | None) -> tuple[Tensor, LayerOutputs | None]:
        """The layers' forward pass; what backward will need is kept."""
        hidden_states, *outputs = _Segment.apply(self, hidden_states, *(context or ()))
        return hidden_states, LayerOutputs(*outputs) if outputs else None

    def forward(self, hidden_states: Tensor, context: LayerOutputs | None) -> tuple[Tensor, LayerOutputs | None]:
        """The pass itself, without a graph."""
        self.start = Boundary(self.store, hidden_states, context)
        if self.strategy == "full":
            self._random = RandomStates.capture() if self.draws else None
            return self._plain(hidden_states, context)
        streams: list[Tensor] = []
        for layer in self.layers:
            memory = self._memory(layer)
            self.memories.append(memory)
            streams.append(hidden_states)
            hidden_states, outputs = layer(hidden_states, context=context, memory=memory, **self.shared)
            if self.strategy == "inverse" and context is not None and outputs is not None:
                memory.growth = self._note_growth(layer, context, outputs)
            context = outputs if layer.returns_outputs else None
        if self._ends_in_anchor():
            self.end = Boundary(self.store, None, outputs)
        self._put_away(streams[1:] if self.strategy == "inverse" else [])
        return hidden_states, context

    def _note_growth(self, layer: Layer, below: LayerOutputs, outputs: LayerOutputs) -> Tensor:
        """Largest |Y_l| / |Y_{l-1}| of a token, by position: this rank's shards, this micro-batch."""
        # by token, because a few tokens with large outputs would hide what happens to all others
        growth = torch.stack([(_norms(y) / _norms(x)).max() for y, x in zip(outputs, below, strict=True)])
        noted = self.growth.get(layer.index)
        self.growth[layer.index] = growth if noted is None else torch.maximum(noted, growth)
        return growth

    def _lists(self) -> dict[str, list[Tensor]]:
        """Every list of kept tensors, by a name that is the same in every run."""
        return {f"{i}.{name}": kept for i, memory in enumerate(self.memories) for name, kept in memory.kept().items()}

    def _put_away(self, streams: list[Tensor]) -> None:
        lists = {**self._lists(), "x": streams}
        named = {f"{name}.{i}": x for name, tensors in lists.items() for i, x in enumerate(tensors)}
        self._stored = self.store.keep(named, replicated={name for name in named if ".attention." not in name})
        for tensors in lists.values():
            tensors[:] = [None] * len(tensors)  # type: ignore[list-item]
        self._streams = streams

    def _take_out(self) -> None:
        found, self._stored = self._stored.restore(), StoredTensors({})
        for name, tensors in {**self._lists(), "x": self._streams}.items():
            tensors[:] = [found.pop(f"{name}.{i}") for i in range(len(tensors))]

    def _plain(self, hidden_states: Tensor, context: LayerOutputs | None) -> tuple[Tensor, LayerOutputs | None]:
        for layer in self.layers:
            hidden_states, context = layer(hidden_states, context=context, **self.shared)
        return hidden_states, context

    @property
    def passes_on(self) -> bool:
        """The next segment of this stage starts with the outputs of this one's last layer."""
        return self.layers[-1].returns_outputs and not self.last

    def _memory(self, layer: Layer) -> LayerMemory:
        # a full-rank layer's outputs will be known if the next segment starts with them, or the walk comes to them
        known = layer.returns_outputs if layer is not self.layers[-1] else self.passes_on
        groups = {name: GroupMemory(keep_graph=known) for name in GROUPS}
        return LayerMemory(self.config.recompute_keep_attention_output, self.draws, groups)

    def _ends_in_anchor(self) -> bool:
        """`inverse` keeps the outputs at the end of a chain, where no segment starts with them."""
        return self.strategy == "inverse" and len(self.layers) > 1 and not self.passes_on

    def backward(self, grads: Grads) -> list[Tensor | None]:
        """Gradients of what entered, from those of what left: the residual stream first, then the outputs."""
        if self.strategy == "full":
            return self._backward_of_all(grads)
        self._take_out()
        states = self._states_downward() if self.strategy == "inverse" else self._states_upward()
        for layer, state in zip(reversed(self.layers), states, strict=True):
            grads = self._backward_of_layer(layer, self.memories.pop(), state, grads)
            del state  # gone before the next layer's outputs are rebuilt
        gradient, *others = grads
        if self._beyond_tolerance is not None and gradient is not None:
            # the plan was made for other betas or outputs: better no number than a wrong one
            gradient = gradient.masked_fill(self._beyond_tolerance, math.nan)
        return [gradient, *others]

    @torch.no_grad()
    def _states_upward(self) -> Iterator[LayerState]:
        """`replay`: the states of all layers, rebuilt from the start, handed out from the last to the first."""
        hidden_states, context = self.start.hidden_states, self.start.outputs
        states: list[LayerState] = []
        for layer, memory in zip(self.layers, self.memories, strict=True):
            entered = hidden_states, context
            if layer is self.layers[-1] and self.end is not None:
                context = self.end.outputs
            elif self.config.is_full_rank(layer.index):
                context = None
            else:
                hidden_states, context = layer.rebuild(hidden_states, context, memory)
            states.append((*entered, context))
            if not layer.returns_outputs:
                context = None
        self.end = None
        del hidden_states, context, entered, memory
        while states:
            yield states.pop()

    @torch.no_grad()
    def _states_downward(self) -> Iterator[LayerState]:
        """`inverse`: the states from the last layer to the first, outputs by division, X as it was kept."""
        streams = [self.start.hidden_states, *self._streams]
        self._streams = []
        outputs = self.end.outputs if self.end is not None else None
        self.end = None
        errors = torch.zeros((), device=streams[0].device)
        worst: Tensor | None = None
        for layer in reversed(self.layers):
            if len(streams) == 1:
                previous = self.start.outputs
            else:
                # the backward pass takes the memories away one by one: this layer's is the last
                assert outputs is not None
                memory = self.memories[-1]
                previous = layer.outputs_below(outputs, memory)
                assert memory.growth is not None
                errors = errors_below(errors, memory.scales(), memory.growth)
                worst = errors if worst is None else torch.maximum(worst, errors)
            yield streams.pop(), previous, outputs
            outputs = previous
        if worst is not None:
            # the plan knew the sizes of the step before: one step may change them a little
            self._beyond_tolerance = ~(worst.max() <= DRIFT * amplification_limit(self.config))

    def _backward_of_layer(
        self, layer: Layer, memory: LayerMemory, state: LayerState, grads: Grads
    ) -> list[Tensor | None]:
        hidden_states, context, outputs = state
        if outputs is not None:
            memory.know(outputs)
        x, y = _leaves(hidden_states, context)
        with torch.enable_grad():
            results = layer(x, context=y, memory=memory, **self.shared)
        return _differentiate(results, grads, (x, y))

    def _backward_of_all(self, grads: Grads) -> list[Tensor | None]:
        self.end = None
        x, y = _leaves(self.start.hidden_states, self.start.outputs)
        with torch.enable_grad():
            if self._random is None:
                results = self._plain(x, y)
            else:
                with self._random.replay():
                    results = self._plain(x, y)
        return _differentiate(results, grads, (x, y))


def _norms(y: Tensor) -> Tensor:
    return torch.linalg.vector_norm(y, dim=-1, dtype=torch.float32)


def _leaves(hidden_states: Tensor, context: LayerOutputs | None) -> tuple[Tensor, LayerOutputs | None]:
    x = hidden_states.detach().requires_grad_()
    return x, LayerOutputs(*(y.detach().requires_grad_() for y in context)) if context is not None else None


def _differentiate(
    results: tuple[Tensor, LayerOutputs | None], grads: Grads, leaves: tuple[Tensor, LayerOutputs | None]
) -> list[Tensor | None]:
    """Run backward from the results; weights accumulate, gradients of the leaves are returned."""
    hidden_states, outputs = results
    pairs = [(y, g) for y, g in zip([hidden_states, *(outputs or ())], grads, strict=False) if g is not None]
    torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
    x, context = leaves
    return [x.grad, *(y.grad for y in context or ())]


class _Segment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: SegmentRun, hidden_states: Tensor, *context: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        with run.store.forward_pass():
            hidden_states, outputs = run.forward(hidden_states, LayerOutputs(*context) if context else None)
        return hidden_states, *(outputs or ())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        run, ctx.run = ctx.run, None  # freed even if this pass fails
        with run.store.backward_pass():
            return None, *run.backward(grads)
