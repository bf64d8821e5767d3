"""Counts the bytes of tensors that are alive, in a real run or on fake tensors, by watching every operation."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveMemory(TorchDispatchMode):
    """While active, follows the storages that operations create until they are freed.

    Attributes:
        current: bytes alive now.
        peak: largest `current` since the last `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: dict[int, Any] = {}

    def reset_peak(self) -> None:
        """Start a new peak from what is alive now."""
        self.peak = self.current

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.observe(func, args, kwargs, out)
        return out

    def observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Follow what an operation has created, once it has run."""
        # an operation may return its input, which is followed already or was there before this counter
        before = {id(x.untyped_storage()) for x in tensors_in((args, kwargs))}
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            # DeepSpeed notes shapes in tensors on "meta", which have a size and no memory
            if id(storage) not in before and tensor.device.type != "meta":
                self._follow(storage)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._freed, key, size)
        self.current += size
        self.peak = max(self.peak, self.current)

    def _freed(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.current -= size


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results, in lists, tuples and dictionaries as they come."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
