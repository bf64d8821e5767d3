"""How a global batch is cut into micro-batches over data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from psutil import virtual_memory

from megatron_crnet.config.batch_sizes import BatchSizes
from megatron_crnet.config.model_size import total_parameters
from megatron_crnet.config.schema import Config
from megatron_crnet.utils.errors import require


def check_memory(config: Config, device: torch.device) -> None:
    """Raise ConfigError where what a rank cannot do without is more than all memory, before any of it is asked for."""
    model, training = config.model, config.training
    tp = config.parallel.tensor_model_parallel_size
    weights = total_parameters(model) // (tp * config.parallel.pipeline_model_parallel_size)
    tokens = training.micro_batch_size * training.seq_length
    activations = tokens * max(model.hidden_size, model.vocab_size) // tp
    needed = (2 if training.bf16 else 4) * (weights + activations)
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else virtual_memory().total
    require(
        needed <= there,
        f"{weights} weights of a rank and the activations of training.micro_batch_size {training.micro_batch_size} x "
        f"seq_length {training.seq_length} tokens need more than {needed / 2**30:,.0f} GiB, but {device} has "
        f"{there / 2**30:,.0f} GiB: make the model or the micro-batch smaller, or use more tensor- or "
        "pipeline-parallel ranks",
    )


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
        """How the batch size grows, in words; None where it does not."""
        sizes = self.sizes
        if not sizes.has_ramp:
            return None
        steps = sizes.ramp_steps
        return (
            f"batch size from {sizes.start} to {sizes.full} sequences in steps of {sizes.increment}, over "
            f"{sizes.after(steps):,} sequences in {steps:,} steps"
        )


def data_parallel_size(config: Config, world_size: int) -> int:
    """Ranks left over for data parallelism.

    Raises:
        ConfigError: the world does not divide by the model-parallel size.
    """
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    require(
        world_size % (tp * pp) == 0,
        f"world size {world_size} does not divide by tensor_model_parallel_size {tp} x pipeline_model_parallel_size "
        f"{pp}: use a multiple of {tp * pp} (crnet launch --nproc_per_node={tp * pp}; before a dry run "
        f"WORLD_SIZE={tp * pp}; --world-size of an estimate), or lower one of the two",
    )
    return world_size // (tp * pp)


def plan_batches(config: Config, world_size: int) -> BatchPlan:
    """The plan for a world of `world_size` ranks.

    Raises:
        ConfigError: the batch does not fit the ranks, or the interleaved schedule.
    """
    training, dp = config.training, data_parallel_size(config, world_size)
    samples = training.micro_batch_size * dp
    count, rest = divmod(training.global_batch_size, samples)
    near = f"{count * samples} or {(count + 1) * samples}" if count else f"{samples}"
    require(
        rest == 0 and count > 0,
        f"training.global_batch_size {training.global_batch_size} does not divide by micro_batch_size "
        f"{training.micro_batch_size} x {dp} data-parallel ranks: use {near}, or another "
        "micro_batch_size",
    )
    pp, vpp = config.parallel.pipeline_model_parallel_size, config.parallel.virtual_pipeline_model_parallel_size or 1
    require(
        vpp == 1 or count % pp == 0,
        f"{count} micro-batches a step do not divide by pipeline_model_parallel_size {pp}, which virtual pipeline "
        f"stages need: use global_batch_size {(count // pp + 1) * pp * samples} or fewer virtual stages",
    )
    sizes = BatchSizes.of(training)
    _check_ramp(sizes, samples * (pp if vpp > 1 else 1))
    return BatchPlan(training.micro_batch_size, count, dp, training.global_batch_size, training.seq_length, sizes)


def _check_ramp(sizes: BatchSizes, unit: int) -> None:
    """Every size of the ramp can be cut into micro-batches.

    Args:
        unit: what each size has to be a multiple of.
    """
    if not sizes.has_ramp:
        return
    for name, value in (("start", sizes.start), ("increment", sizes.increment)):
        require(
            value % unit == 0,
            f"training.rampup_batch_size has the {name} {value}, which does not divide by {unit}, the sequences of a "
            f"micro-batch on all data-parallel ranks (times pipeline stages, where they are virtual): use "
            f"{-(-value // unit) * unit}",
        )
