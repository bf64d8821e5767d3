"""Patches that let Megatron-Core and DeepSpeed run without a CUDA device; with one they are not applied.

Megatron-Core asks `torch.cuda` for the current device and for random states, and creates some tensors on "cuda" by
name; its fusions and DeepSpeed's CPU back end load compilers that nothing here uses.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from megatron_crnet.utils.noise import silence_libraries

_installed = False


def quiet_libraries() -> None:
    """Set DeepSpeed's accelerator before it probes for one, and filter the messages of `utils/noise.py`."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    silence_libraries()


def install() -> None:
    """Prepare the process before Megatron-Core and DeepSpeed are used; harmless when called again."""
    global _installed
    quiet_libraries()
    if torch.cuda.is_available() or _installed:
        return
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.set_device = lambda *_: None
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    with _without_a_compiler():
        _install_rng()
        _install_torch()
    _preset_operators()
    _installed = True


@contextmanager
def _without_a_compiler() -> Iterator[None]:
    """While Megatron-Core is imported: it gives its fusions to `torch.compile`, which loads for three seconds.

    Nothing here calls them, and on first call they would ask for a C++ compiler.
    """
    original = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


def _as_it_is(function: Any = None, **_: Any) -> Any:
    return function if function is not None else _as_it_is


def _install_rng() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


class _Stream:
    """A stream and its events, where every operation is done when it returns."""

    def wait_stream(self, _: Any) -> None:
        pass

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


class _CudaWithoutDevice:
    """The module torch.cuda, with one stream."""

    _stream = _Stream()
    stream = staticmethod(nullcontext)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_stream(self) -> _Stream:
        return self._stream

    Stream = current_stream


class _TorchWithoutCuda:
    """The module torch, with `zeros` on "cuda" made on the CPU."""

    cuda = _CudaWithoutDevice()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **kwargs)


def _install_torch() -> None:
    """Give it to the modules that make counters on "cuda" by name, or streams.

    A TorchFunctionMode would cost each operation of a small model a tenth of its time, and a wrapped `torch.zeros`
    would be unknown to `with torch.device(...)`.
    """
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    for module in (schedules, moe_utils, token_dispatcher):
        module.torch = _TorchWithoutCuda()
    token_dispatcher.maybe_move_tensor_to_cpu = _on_the_host


def _on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What Megatron-Core's function of this name does with tensors of a device."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _preset_operators() -> None:
    import deepspeed

    # preset, because DeepSpeed probes by compiling every operator
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
