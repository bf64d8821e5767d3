"""The states of all random number generators that dropout may use, so that a recomputation draws the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import deepspeed
import torch
from megatron.core import tensor_parallel
from torch import Tensor


@dataclass(frozen=True)
class RngStates:
    """The CPU's and the device's generator, Megatron-Core's and DeepSpeed's trackers.

    Outside CUDA the device's generator is the CPU's (`distributed/cpu_backend.py`).
    """

    cpu: Tensor
    device: Tensor
    megatron: dict[str, Tensor]
    deepspeed: dict[str, Tensor]

    @classmethod
    def capture(cls) -> RngStates:
        """The states of this moment."""
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state(),
            tensor_parallel.get_cuda_rng_tracker().get_states(),
            deepspeed.checkpointing.get_cuda_rng_tracker().get_states(),
        )

    def restore(self) -> None:
        """Make them the current states."""
        torch.set_rng_state(self.cpu)
        torch.cuda.set_rng_state(self.device)
        # copies, because a tracker writes into the dictionary that it is given
        tensor_parallel.get_cuda_rng_tracker().set_states(dict(self.megatron))
        deepspeed.checkpointing.get_cuda_rng_tracker().set_states(dict(self.deepspeed))

    def tensors(self) -> dict[str, Tensor]:
        """Every state by name, for a file."""
        return {
            "cpu": self.cpu,
            "device": self.device,
            **{f"megatron.{name}": state for name, state in self.megatron.items()},
            **{f"deepspeed.{name}": state for name, state in self.deepspeed.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> RngStates:
        """The inverse of `tensors`."""
        trackers: dict[str, dict[str, Tensor]] = {"megatron": {}, "deepspeed": {}}
        for name, state in tensors.items():
            tracker, _, key = name.partition(".")
            if key:
                trackers[tracker][key] = state
        return cls(tensors["cpu"], tensors["device"], trackers["megatron"], trackers["deepspeed"])

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Inside, generators start from these states; afterwards they are where they were."""
        now = RngStates.capture()
        self.restore()
        try:
            yield
        finally:
            now.restore()
