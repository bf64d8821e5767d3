"""Activation recomputation of a run of layers: forward without a graph, backward layer by layer.

One class per strategy, by what it saves and how backward gets the rest (docs/recomputation.md):

    FullSegment      saves X and Y where it starts; runs the layers again
    ReplaySegment    also every layer's z; rebuilds X and Y in forward order with the forward pass's own operations
    InverseSegment   X and z of every layer and Y at both ends; rebuilds Y in backward order, Y_{l-1} = (Y_l - z B) / s

The last two record a tape per layer (`recompute/tape.py`). In backward, one layer at a time then repeats its norms,
RoPE, attention and SwiGLU with a graph, in which the products that are known already only pass their values on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_crnet.config.architectures import Architecture
from megatron_crnet.config.megatron import CRNetTransformerConfig
from megatron_crnet.recompute.planner import amplification_limit, errors_of_previous
from megatron_crnet.recompute.rng import RngStates
from megatron_crnet.recompute.storage import ActivationStore, StoredTensors
from megatron_crnet.recompute.tape import LayerOutputs, LayerTape, Mode

DRIFT = 2.0
"""How far the estimated error of a pass may exceed the one that its segments were planned for."""

Grads = Sequence[Tensor | None]
LayerState = tuple[Tensor, LayerOutputs | None, LayerOutputs | None]
"""Residual stream that enters a layer, outputs of the previous layer, its own outputs (None: not known)."""


class Layer(Protocol):
    """What recomputation asks of a layer, such as `model.layer.CRNetTransformerLayer`, where each is documented."""

    index: int
    returns_outputs: bool

    def __call__(
        self, hidden_states: Tensor, *, context: LayerOutputs | None, tape: LayerTape | None = None, **shared: Any
    ) -> tuple[Tensor, LayerOutputs | None]:
        """The layer's forward pass; with `tape` it is recorded or replayed, and outputs are returned."""

    def rebuild(
        self, hidden_states: Tensor, context: LayerOutputs | None, tape: LayerTape
    ) -> tuple[Tensor, LayerOutputs | None]:
        """What the forward pass returned, from the low-rank outputs on the tape."""

    def invert(self, outputs: LayerOutputs, tape: LayerTape) -> tuple[LayerOutputs, Tensor]:
        """The previous layer's outputs, from this layer's, and s(beta) of all positions."""


class Boundary:
    """X, and Y where a chain passes, at the start of a segment: saved once, used by the segments on both sides."""

    def __init__(
        self,
        architecture: Architecture,
        store: ActivationStore,
        hidden_states: Tensor | None,
        outputs: LayerOutputs | None,
    ) -> None:
        self._names = architecture.names if outputs is not None else ()
        named = dict(zip(self._names, outputs or (), strict=True))
        if hidden_states is not None:
            named = {"x": hidden_states, **named}
        self._stored: StoredTensors | None = store.keep(named, replicated=("x", *architecture.rows))
        self._restored: dict[str, Tensor] = {}

    def _restore(self) -> dict[str, Tensor]:
        if self._stored is not None:
            # brought to the device once, by the segment that ends here
            self._restored, self._stored = self._stored.restore(), None
        return self._restored

    @property
    def hidden_states(self) -> Tensor:
        """The residual stream X."""
        return self._restore()["x"]

    @property
    def outputs(self) -> LayerOutputs | None:
        """The outputs Y of the previous layer, None where a chain starts."""
        found = self._restore()
        return tuple(found[name] for name in self._names) or None


class Segment(ABC):
    """One pass of one micro-batch through a run of layers, from its forward pass to its backward pass.

    Args:
        layers: the segment's layers.
        store: where saved tensors live.
        shared: arguments that every layer is called with; they are not put away, as there is one of them for all.
        last: no segment of this stage follows.
        norm_ratios: where `inverse` records the norms of outputs (`CRNetTransformerBlock.norm_ratios`).
    """

    def __init__(
        self,
        config: CRNetTransformerConfig,
        layers: Sequence[Layer],
        store: ActivationStore,
        shared: Mapping[str, Any],
        last: bool,
        norm_ratios: dict[int, Tensor],
    ) -> None:
        self.config, self.layers, self.store, self.shared = config, layers, store, shared
        self.last, self.norm_ratios = last, norm_ratios
        self.start: Boundary
        self.end: Boundary | None = None
        """Where the next segment starts, or the outputs at this stage's end under `inverse`."""

    def __call__(self, hidden_states: Tensor, context: LayerOutputs | None) -> tuple[Tensor, LayerOutputs | None]:
        """The layers' forward pass; what backward will need is saved."""
        hidden_states, *outputs = _Recompute.apply(self, hidden_states, *(context or ()))
        return hidden_states, tuple(outputs) or None

    @property
    def passes_on(self) -> bool:
        """The next segment of this stage starts with the outputs of this one's last layer."""
        return self.layers[-1].returns_outputs and not self.last

    @abstractmethod
    def forward(self, hidden_states: Tensor, context: LayerOutputs | None) -> tuple[Tensor, LayerOutputs | None]:
        """The pass itself, without a graph; `start` is there."""

    @abstractmethod
    def backward(self, grads: Grads) -> list[Tensor | None]:
        """Gradients of what entered, from those of what left: the residual stream first, then the outputs."""


class FullSegment(Segment):
    """Runs all its layers again, with one graph for all."""

    _rng: RngStates | None = None

    def forward(self, hidden_states: Tensor, context: LayerOutputs | None) -> tuple[Tensor, LayerOutputs | None]:
        """Save the RNG states alone."""
        self._rng = RngStates.capture() if self.config.has_dropout else None
        return self._run(hidden_states, context)

    def backward(self, grads: Grads) -> list[Tensor | None]:
        """Repeat the pass and differentiate it."""
        self.end = None
        x, y = _leaves(self.start.hidden_states, self.start.outputs)
        with torch.enable_grad():
            if self._rng is None:
                results = self._run(x, y)
            else:
                with self._rng.scope():
                    results = self._run(x, y)
        return _differentiate(results, grads, (x, y))

    def _run(self, hidden_states: Tensor, context: LayerOutputs | None) -> tuple[Tensor, LayerOutputs | None]:
        for layer in self.layers:
            hidden_states, context = layer(hidden_states, context=context, **self.shared)
        return hidden_states, context


class TapedSegment(Segment):
    """Records a tape per layer, and differentiates one layer at a time."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tapes: list[LayerTape] = []
        self._streams: list[Tensor] = []
        self._stored = StoredTensors({})

    def forward(self, hidden_states: Tensor, context: LayerOutputs | None) -> tuple[Tensor, LayerOutputs | None]:
        """Record every layer, and put away what the tapes hold."""
        streams: list[Tensor] = []
        outputs: LayerOutputs | None = None
        for layer in self.layers:
            # outputs are known in backward where the next segment starts with them, or where they are rebuilt
            known = layer.returns_outputs if layer is not self.layers[-1] else self.passes_on
            tape = LayerTape(self.config, outputs_known=known, rebuilds_stream=self._rebuilds_stream_behind(layer))
            self.tapes.append(tape)
            streams.append(hidden_states)
            hidden_states, outputs = layer(hidden_states, context=context, tape=tape, **self.shared)
            self._observe(layer, context, outputs)
            context = outputs if layer.returns_outputs else None
        self._put_away(self._saved_streams(streams, outputs))
        return hidden_states, context

    def _rebuilds_stream_behind(self, layer: Layer) -> bool:
        """Whether backward rebuilds the residual stream that leaves the layer."""
        return False

    def _observe(self, layer: Layer, previous: LayerOutputs | None, outputs: LayerOutputs | None) -> None:
        """Called with every layer's outputs while they exist."""

    def _saved_streams(self, streams: list[Tensor], outputs: LayerOutputs | None) -> list[Tensor]:
        """The residual streams to save, of those that entered the layers; `outputs` are the last layer's."""
        return []

    @abstractmethod
    def _states(self) -> Iterator[LayerState]:
        """The states of all layers, from the last to the first, rebuilt from what was saved."""

    def backward(self, grads: Grads) -> list[Tensor | None]:
        """Rebuild every layer's state and differentiate it."""
        self._take_out()
        for layer, state in zip(reversed(self.layers), self._states(), strict=True):
            grads = self._backward_of_layer(layer, self.tapes.pop(), state, grads)
            del state  # gone before the previous layer's outputs are rebuilt
        return list(grads)

    def _backward_of_layer(self, layer: Layer, tape: LayerTape, state: LayerState, grads: Grads) -> list[Tensor | None]:
        hidden_states, context, outputs = state
        if outputs is not None:
            tape.set_outputs(outputs)
        x, y = _leaves(hidden_states, context)
        with torch.enable_grad():
            results = layer(x, context=y, tape=tape.enter(Mode.REPLAY), **self.shared)
        return _differentiate(results, grads, (x, y))

    def _lists(self) -> dict[str, list[Tensor]]:
        """Every list of saved tensors, by a name that is the same in every run."""
        return {
            **{f"{i}.{name}": saved for i, tape in enumerate(self.tapes) for name, saved in tape.tensors().items()},
            "x": self._streams,
        }

    def _put_away(self, streams: list[Tensor]) -> None:
        self._streams = streams
        lists = self._lists()
        named = {f"{name}.{i}": x for name, tensors in lists.items() for i, x in enumerate(tensors)}
        self._stored = self.store.keep(named, replicated={name for name in named if ".attention." not in name})
        for tensors in lists.values():
            tensors[:] = [None] * len(tensors)  # type: ignore[list-item]

    def _take_out(self) -> None:
        found, self._stored = self._stored.restore(), StoredTensors({})
        for name, tensors in self._lists().items():
            tensors[:] = [found.pop(f"{name}.{i}") for i in range(len(tensors))]


class ReplaySegment(TapedSegment):
    """Rebuilds X and Y from its start, the same bits."""

    def _rebuilds_stream_behind(self, layer: Layer) -> bool:
        return layer is not self.layers[-1]

    @torch.no_grad()
    def _states(self) -> Iterator[LayerState]:
        hidden_states, context = self.start.hidden_states, self.start.outputs
        states: list[LayerState] = []
        for layer, tape in zip(self.layers, self.tapes, strict=True):
            entered = hidden_states, context
            if layer is self.layers[-1] and self.end is not None:
                context = self.end.outputs
            elif self.config.table.has_dense(layer.index):
                context = None
            else:
                hidden_states, context = layer.rebuild(hidden_states, context, tape)
            states.append((*entered, context))
            if not layer.returns_outputs:
                context = None
        self.end = None
        del hidden_states, context, entered, tape
        while states:
            yield states.pop()


class InverseSegment(TapedSegment):
    """Rebuilds Y from its end by division, with X as it was saved.

    The error of this is estimated from this pass's outputs and betas: where it exceeds what the segments were planned
    for, the gradient is NaN rather than wrong.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._ratios: dict[int, Tensor] = {}
        self._largest_error: Tensor | None = None

    def _observe(self, layer: Layer, previous: LayerOutputs | None, outputs: LayerOutputs | None) -> None:
        """Record the largest |Y_l| / |Y_{l-1}| of a token, by position: this rank's shards, this micro-batch."""
        if previous is None or outputs is None:
            return
        # by token, because a few tokens with large outputs would hide what happens to all others
        ratio = torch.stack([(_norms(y) / _norms(x)).max() for y, x in zip(outputs, previous, strict=True)])
        self.norm_ratios[layer.index] = _maximum(self.norm_ratios.get(layer.index), ratio)
        self._ratios[layer.index] = ratio

    def _saved_streams(self, streams: list[Tensor], outputs: LayerOutputs | None) -> list[Tensor]:
        if len(self.layers) > 1 and not self.passes_on:
            # no segment starts with the outputs that are to be inverted
            self.end = Boundary(self.config.table.architecture, self.store, None, outputs)
        return streams[1:]

    @torch.no_grad()
    def _states(self) -> Iterator[LayerState]:
        streams = [self.start.hidden_states, *self._streams]
        self._streams = []
        outputs = self.end.outputs if self.end is not None else None
        self.end = None
        errors = torch.zeros((), device=streams[0].device)
        for layer in reversed(self.layers):
            if len(streams) == 1:
                previous = self.start.outputs
            else:
                assert outputs is not None
                # backward takes the tapes away one by one: this layer's is the last
                previous, scales = layer.invert(outputs, self.tapes[-1])
                errors = errors_of_previous(errors, scales, self._ratios[layer.index])
                del scales
                self._largest_error = _maximum(self._largest_error, errors)
            yield streams.pop(), previous, outputs
            outputs = previous

    def backward(self, grads: Grads) -> list[Tensor | None]:
        """As its base; NaN where the error is too large."""
        gradient, *others = super().backward(grads)
        if self._largest_error is not None and gradient is not None:
            # the segments were planned by the norms of the step before: one step may change them a little
            within = self._largest_error.max() <= DRIFT * amplification_limit(self.config)
            gradient = gradient.masked_fill(~within, math.nan)
        return [gradient, *others]


SEGMENTS: dict[str, type[Segment]] = {"full": FullSegment, "replay": ReplaySegment, "inverse": InverseSegment}
"""The class of every `recompute.strategy`."""


def _maximum(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else torch.maximum(one, other)


def _norms(y: Tensor) -> Tensor:
    return torch.linalg.vector_norm(y, dim=-1, dtype=torch.float32)


def _leaves(hidden_states: Tensor, context: LayerOutputs | None) -> tuple[Tensor, LayerOutputs | None]:
    x = hidden_states.detach().requires_grad_()
    return x, tuple(y.detach().requires_grad_() for y in context) if context is not None else None


def _differentiate(
    results: tuple[Tensor, LayerOutputs | None], grads: Grads, leaves: tuple[Tensor, LayerOutputs | None]
) -> list[Tensor | None]:
    """Run backward from the results; weights accumulate, gradients of the leaves are returned."""
    hidden_states, outputs = results
    pairs = [(y, g) for y, g in zip([hidden_states, *(outputs or ())], grads, strict=False) if g is not None]
    torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
    x, context = leaves
    return [x.grad, *(y.grad for y in context or ())]


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, segment: Segment, hidden_states: Tensor, *context: Tensor) -> tuple[Tensor, ...]:
        ctx.segment = segment
        ctx.set_materialize_grads(False)
        outputs: LayerOutputs | None = context or None
        with segment.store.forward_pass():
            segment.start = Boundary(segment.config.table.architecture, segment.store, hidden_states, outputs)
            hidden_states, outputs = segment.forward(hidden_states, outputs)
        return hidden_states, *(outputs or ())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        segment, ctx.segment = ctx.segment, None  # freed even if this pass fails
        with segment.store.backward_pass():
            return None, *segment.backward(grads)
