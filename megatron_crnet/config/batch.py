"""Sequences of each optimizer step, and their split into micro-batches over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from psutil import virtual_memory

from megatron_crnet.config.experts_rules import check_expert_replicas
from megatron_crnet.config.model_size import expert_parameters, total_parameters
from megatron_crnet.config.schema import Config, TrainingConfig
from megatron_crnet.utils.errors import multiples_near, require


def check_memory(config: Config, device: torch.device) -> None:
    """Raise ConfigError if weights and one activation of a rank alone exceed the memory of `device`."""
    model, training = config.model, config.training
    tp, pp, _ = config.parallel.sizes
    of_experts = expert_parameters(model)
    weights = (total_parameters(model) - of_experts) // (tp * pp)
    weights += of_experts // (config.parallel.expert_model_parallel_size * pp)
    tokens = training.micro_batch_size * training.seq_length
    activations = tokens * max(model.hidden_size, model.vocab_size) // tp
    needed = (2 if training.bf16 else 4) * (weights + activations)
    is_cuda = device.type == "cuda"
    available = torch.cuda.get_device_properties(device).total_memory if is_cuda else virtual_memory().total
    require(
        needed <= available,
        f"{weights} weights of a rank and the activations of training.micro_batch_size {training.micro_batch_size} x "
        f"seq_length {training.seq_length} tokens need more than {needed / 2**30:,.0f} GiB, but {device} has "
        f"{available / 2**30:,.0f} GiB: make the model or the micro-batch smaller, or use more tensor-, "
        f"{'expert-, ' if of_experts else ''}or pipeline-parallel ranks",
    )


@dataclass(frozen=True)
class BatchSizes:
    """Sequences per optimizer step: the global batch size, or Megatron's ramp up to it.

    `training.rampup_batch_size` [start, increment, samples]: the size grows from `start` by `increment` in equal parts
    of the first `samples` sequences. It is a function of the sequences seen, so a resumed run continues the ramp.

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
        """The sizes of a valid configuration."""
        full, ramp = training.global_batch_size, training.rampup_batch_size
        return cls(full, *ramp) if ramp else cls(full, full)

    @property
    def has_ramp(self) -> bool:
        """Whether the size changes during a run."""
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
        """Remaining levels of the ramp after `seen` sequences: size, and steps of that size."""
        while (size := self.at(seen)) < self.full:
            levels = (self.full - self.start) // self.increment
            # the first sequence of the next level
            end = -(-((size - self.start) // self.increment + 1) * self.samples // levels)
            steps = -(-(end - seen) // size)
            yield size, steps
            seen += steps * size


@dataclass(frozen=True)
class BatchPlan:
    """The arithmetic of one optimizer step.

    Attributes:
        micro_batch_size: sequences of one forward pass.
        num_microbatches: forward passes of one rank in one step.
        dp_size: data-parallel ranks.
        global_batch_size: sequences of one step over all ranks, after a ramp of the batch size.
        seq_length: tokens of a sequence.
        sizes: sequences of each step of the run.
    """

    micro_batch_size: int
    num_microbatches: int
    dp_size: int
    global_batch_size: int
    seq_length: int
    sizes: BatchSizes

    @property
    def tokens_per_step(self) -> int:
        """Positions of one step, padding included."""
        return self.global_batch_size * self.seq_length

    def tokens_of_run(self, steps: int) -> int:
        """Positions of the first `steps` steps, padding included."""
        return self.sizes.after(steps) * self.seq_length

    def ramp_line(self) -> str | None:
        """A line that describes the ramp; None without one."""
        sizes = self.sizes
        if not sizes.has_ramp:
            return None
        steps = sizes.ramp_steps
        return (
            f"batch size from {sizes.start} to {sizes.full} sequences in steps of {sizes.increment}, over "
            f"{sizes.after(steps):,} sequences in {steps:,} steps"
        )


def data_parallel_size(config: Config, world_size: int) -> int:
    """The data-parallel size.

    Raises:
        ConfigError: the world size does not divide by the model-parallel size.
    """
    tp, pp, _ = config.parallel.sizes
    require(
        world_size % (tp * pp) == 0,
        f"world size {world_size} does not divide by tensor_model_parallel_size {tp} x pipeline_model_parallel_size "
        f"{pp}: use a multiple of {tp * pp} (crnet launch --nproc_per_node={tp * pp}; before a dry run "
        f"WORLD_SIZE={tp * pp}; --world-size of an estimate), or lower one of the two",
    )
    check_expert_replicas(config, world_size // (tp * pp))
    return world_size // (tp * pp)


def plan_batches(config: Config, world_size: int) -> BatchPlan:
    """The plan for a world of `world_size` ranks.

    Raises:
        ConfigError: the batch does not fit the ranks, or the interleaved schedule.
    """
    training, dp = config.training, data_parallel_size(config, world_size)
    samples = training.micro_batch_size * dp
    count, rest = divmod(training.global_batch_size, samples)
    require(
        rest == 0 and count > 0,
        f"training.global_batch_size {training.global_batch_size} does not divide by micro_batch_size "
        f"{training.micro_batch_size} x {dp} data-parallel ranks: use "
        f"{multiples_near(training.global_batch_size, samples)}, or another micro_batch_size",
    )
    _, pp, vpp = config.parallel.sizes
    require(
        vpp == 1 or count % pp == 0,
        f"{count} micro-batches per step do not divide by pipeline_model_parallel_size {pp}, which virtual pipeline "
        f"stages need: use global_batch_size {(count // pp + 1) * pp * samples}, or no virtual stages",
    )
    sizes = BatchSizes.of(training)
    _check_ramp(sizes, samples * (pp if vpp > 1 else 1))
    return BatchPlan(training.micro_batch_size, count, dp, training.global_batch_size, training.seq_length, sizes)


def _check_ramp(sizes: BatchSizes, unit: int) -> None:
    """Every size of the ramp is a multiple of `unit`."""
    for name, value in (("start", sizes.start), ("increment", sizes.increment)) if sizes.has_ramp else ():
        require(
            value % unit == 0,
            f"training.rampup_batch_size has the {name} {value}, which does not divide by {unit}, the sequences of a "
            f"micro-batch on all data-parallel ranks (times pipeline stages, where they are virtual): use "
            f"{-(-value // unit) * unit}",
        )
