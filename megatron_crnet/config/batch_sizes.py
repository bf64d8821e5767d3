"""How many sequences each optimizer step takes: the global batch, or on the way to it a ramp of Megatron's form.

`training.rampup_batch_size` [start, increment, samples]: from `start` on, `increment` more after each equal part of the
first `samples` sequences, until global_batch_size. A step's size follows from the sequences seen before it, so that a
resumed run goes on with the size that it would have had.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_crnet.config.schema import TrainingConfig


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of the steps of a run, in sequences.

    Attributes:
        full: the global batch size, after the ramp.
        start: size of the first step.
        increment: growth from one level of the ramp to the next.
        samples: sequences after which the size is `full`; 0 without a ramp.
    """

    full: int
    start: int
    increment: int = 1
    samples: int = 0

    @classmethod
    def of(cls, training: TrainingConfig) -> BatchSizes:
        """The sizes of a configuration, which `rules` has checked."""
        full, ramp = training.global_batch_size, training.rampup_batch_size
        return cls(full, *ramp) if ramp else cls(full, full)

    @property
    def has_ramp(self) -> bool:
        """Whether the size changes in the course of a run."""
        return self.start < self.full and self.samples > 0

    def at(self, seen: int) -> int:
        """Size of the step after `seen` sequences."""
        if not self.has_ramp or seen >= self.samples:
            return self.full
        levels = (self.full - self.start) // self.increment
        return self.start + seen * levels // self.samples * self.increment

    def steps(self, seen: int, count: int) -> Iterator[int]:
        """Sizes of the next `count` steps after `seen` sequences."""
        for _ in range(count):
            size = self.at(seen)
            yield size
            seen += size

    def after(self, count: int, seen: int = 0) -> int:
        """Sequences seen when `count` more steps are done after `seen` sequences."""
        for size, steps in self._ramp(seen):
            if count <= steps:
                return seen + count * size
            seen, count = seen + steps * size, count - steps
        return seen + count * self.full

    @property
    def ramp_steps(self) -> int:
        """Steps from the first on that are smaller than the global batch."""
        return sum(steps for _, steps in self._ramp(0))

    def _ramp(self, seen: int) -> Iterator[tuple[int, int]]:
        """Levels below the global batch after `seen` sequences: size, and steps of that size."""
        while (size := self.at(seen)) < self.full:
            levels = (self.full - self.start) // self.increment
            # the first sequence at which the size is another
            end = -(-((size - self.start) // self.increment + 1) * self.samples // levels)
            steps = -(-(end - seen) // size)
            yield size, steps
            seen += steps * size
