"""An autograd subgraph saved without its inputs: recorded once, differentiated later on inputs that are passed again.

Activation recomputation runs the forward pass without a graph. A saved subgraph is the exception: it keeps the graph
of one expensive operation (attention, a full-rank product) with what only that operation knows (attention's output
and its log-sum-exp), but not the inputs, which the recomputation rebuilds anyway. So the operation's own backward
runs on its own saved values, whatever kernel it was, and its forward is not repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks


@dataclass(frozen=True)
class _InputMark:
    index: int


@dataclass(frozen=True)
class _KeptMark:
    index: int


class _Source(torch.autograd.Function):
    """An input of a saved subgraph: the gradient that arrives here is collected."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor | None], index: int, anchor: Tensor, value: Tensor) -> Tensor:
        ctx.gradients, ctx.index = gradients, index
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.gradients[ctx.index] = grads[0]
        return None, None, None, None


class _Resume(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, subgraph: SavedSubgraph, known: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.subgraph = subgraph
        ctx.save_for_backward(*inputs)
        return tuple(y.detach() for y in known)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.subgraph.differentiate(ctx.saved_tensors, grads)


class SavedSubgraph:
    """The graph of one function call.

    Attributes:
        kept: what the graph holds beside its inputs and the weights; may be replaced in place, in order.
    """

    def __init__(self) -> None:
        # plain lists, shared with the graph's nodes: a reference to the subgraph there would be a cycle that
        # Python's collector cannot see
        self.kept: list[Tensor] = []
        self._outputs: list[int] = []
        self._inputs: list[Tensor] = []
        self._gradients: list[Tensor | None] = []
        self._edges: list[GradientEdge] = []

    @classmethod
    def record(
        cls, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, keep_outputs: bool = False
    ) -> tuple[tuple[Tensor, ...], SavedSubgraph]:
        """Call `function(*inputs)` and save its graph, and on demand its outputs.

        Returns the outputs, without a graph, and the subgraph.
        """
        self = cls()
        self._gradients[:] = [None] * len(inputs)
        anchor = torch.empty((), device=inputs[0].device, requires_grad=True)
        with torch.enable_grad():
            sources = [_Source.apply(self._gradients, index, anchor, x) for index, x in enumerate(inputs)]
            with saved_tensors_hooks(*_hooks(sources, self._inputs, self.kept)):
                outputs = function(*sources)
        self._edges = [get_gradient_edge(y) for y in outputs]
        sources.clear()
        outputs = tuple(y.detach() for y in outputs)
        if keep_outputs:
            self._keep(outputs)
        return outputs, self

    def _keep(self, outputs: tuple[Tensor, ...]) -> None:
        """Keep the outputs, too; often the graph holds them anyway."""
        held = {_view(tensor): index for index, tensor in enumerate(self.kept)}
        for output in outputs:
            self._outputs.append(held.get(_view(output), len(self.kept)))
            if self._outputs[-1] == len(self.kept):
                self.kept.append(output)

    def kept_outputs(self) -> tuple[Tensor, ...]:
        """The outputs of the call, if they were kept."""
        return tuple(self.kept[index] for index in self._outputs)

    def resume(self, known: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        """`known` as outputs of the call, joined to `inputs` (rebuilt, same shapes) by the kept graph."""
        return _Resume.apply(self, known, *inputs)

    def differentiate(self, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Gradients of the inputs; those of weights are accumulated. Works once, then the graph is gone."""
        self._inputs[:] = inputs
        torch.autograd.backward(self._edges, grads)
        found = list(self._gradients)
        for values in (self._inputs, self._gradients, self.kept, self._edges):
            values.clear()
        return found


def _view(tensor: Tensor) -> tuple[Any, ...]:
    """The same for two tensors that are the same view of the same memory; works for fake tensors without addresses."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def _hooks(
    sources: list[Tensor], inputs: list[Tensor], kept: list[Tensor]
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    marks = {_view(source): _InputMark(index) for index, source in enumerate(sources)}

    def pack(tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter):
            return tensor  # ZeRO-3 takes its data away and brings it back
        mark = marks.get(_view(tensor))
        if mark is not None:
            return mark
        kept.append(tensor.detach())
        return _KeptMark(len(kept) - 1)

    def unpack(mark: Any) -> Tensor:
        if isinstance(mark, _InputMark):
            return inputs[mark.index]
        return kept[mark.index] if isinstance(mark, _KeptMark) else mark

    return pack, unpack
