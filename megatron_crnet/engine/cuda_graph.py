"""A micro-batch's forward and backward passes as a CUDA graph.

A step of a small model launches thousands of kernels, each of which takes the GPU less time than the host needs to
launch it. Recorded once, they are launched by one call per micro-batch, in the order in which they were recorded: the
same kernels on the same shapes, so the same bits. What differs between micro-batches is copied to where the graph reads
it. The graph's memory is its own and stays: activations of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from megatron_crnet.config.cuda_graphs import SWITCH
from megatron_crnet.engine.schedule import Batch
from megatron_crnet.utils.errors import ConfigError, describe

Results = dict[str, Tensor]
Passes = Callable[[Batch, Tensor], Results]
"""Both passes of a micro-batch; the loss's gradient is multiplied by the factors, [2] in fp32, one after the other."""


class MicroBatchGraph:
    """Runs `passes` as a graph, from the second step on, when all kernels are compiled and all buffers are there.

    Until `close`, this thread's current stream is one of its own: nothing that was first done on the default stream,
    such as autograd's accumulation of a gradient, can be recorded.

    Args:
        passes: adds to gradients that are always in the same places.
        device: where.
    """

    def __init__(self, passes: Passes, device: torch.device) -> None:
        self._passes, self._factors = passes, torch.ones(2, device=device)
        self._shapes: dict[str, Any] | None = None
        self._inputs: Batch = {}
        self._results: Results = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outside: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._outside = torch.cuda.current_stream(device)
            _go_on_in(torch.cuda.Stream(device))

    def close(self) -> None:
        """Let go of the graph's memory, and go on in the stream of before."""
        self._graph, self._inputs, self._results = None, {}, {}
        if self._outside is not None:
            _go_on_in(self._outside)

    def is_for(self, batches: list[Batch]) -> bool:
        """Whether micro-batches of these shapes have run before. False also while operations are intercepted."""
        if is_in_torch_dispatch_mode():
            return False
        shapes = {name: (x.shape, x.dtype) for name, x in batches[0].items()}
        known, self._shapes = self._shapes, shapes
        if known != shapes:
            self._graph = None
        return known == shapes

    def run(self, batches: list[Batch], scale: float, progress: Callable[[], None]) -> list[Results]:
        """The results of every micro-batch of a step.

        Args:
            scale: of the loss, over the number of micro-batches.
            progress: is called after each.
        """
        self._factors[0].fill_(scale)
        self._factors[1].fill_(1 / len(batches))
        if self._graph is None:
            self._inputs = {name: x.clone() for name, x in batches[0].items()}
            self._graph = self._capture()
        found = []
        for batch in batches:
            for name, value in batch.items():
                self._inputs[name].copy_(value)
            self._graph.replay()
            found.append({name: x.clone() for name, x in self._results.items()})
            progress()
        return found

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads (NCCL's watchdog, the loader's) may go on calling CUDA meanwhile
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self._results = self._passes(self._inputs, self._factors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = error.__context__ or error  # the end of the recording fails, too
            raise ConfigError(
                f"{SWITCH} is on (as by default), but the passes of a micro-batch cannot be recorded "
                f"({describe(first)}): set {SWITCH} false"
            ) from error
        return graph


def _go_on_in(stream: torch.cuda.Stream) -> None:
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    torch.cuda.set_stream(stream)
