"""The states of all random generators that dropout may draw from, so that a recomputation draws the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import deepspeed
import torch
from megatron.core import tensor_parallel
from torch import Tensor


@dataclass(frozen=True)
class RandomStates:
    """The CPU's and the device's generator, Megatron-Core's and DeepSpeed's trackers.

    Outside CUDA the device's generator is the CPU's (`cpu_platform.py`).
    """

    cpu: Tensor
    device: Tensor
    megatron: dict[str, Tensor]
    deepspeed: dict[str, Tensor]

    @classmethod
    def capture(cls) -> RandomStates:
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

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Inside, generators start from these states; afterwards they are where they were."""
        now = RandomStates.capture()
        self.restore()
        try:
            yield
        finally:
            now.restore()
