"""Prints the opening lines of a run, and every `logging.log_interval` steps its loss and speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from megatron_crnet.config.cuda_graphs import describe_launches
from megatron_crnet.config.model_size import active_parameters, flops_per_token, total_parameters
from megatron_crnet.config.phases import planned_phases
from megatron_crnet.config.positions import METHODS
from megatron_crnet.engine.expert_load import load_metrics, routing_totals
from megatron_crnet.training.callbacks.base import Callback, Step
from megatron_crnet.training.metrics import largest_peak_memory_bytes
from megatron_crnet.training.preflight import Preflight
from megatron_crnet.training.resumption import changed_glue, changed_layout, glue_in_use

if TYPE_CHECKING:
    from megatron_crnet.training.trainer import Trainer


class StepLog(Callback):
    """Writes metrics and progress."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._started = 0.0

    def on_start(self, trainer: Trainer) -> None:
        """See Callback."""
        for line in opening_lines(trainer):
            trainer.progress.line(line)

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        """See Callback."""
        self._steps.append(step)
        state, values = trainer.state, None
        due = state.step % trainer.config.logging.log_interval == 0 or state.step == 1 or trainer.is_last_step
        if due and state.unlogged_steps:
            values = self._values(trainer)
            trainer.metrics.write(state.step, values)
            trainer.state, self._steps, self._started = state.logged(), [], trainer.training_s
        trainer.progress.advance(state.step, values)

    def _values(self, trainer: Trainer) -> dict[str, Any]:
        steps, state, config, plan = self._steps, trainer.state, trainer.config, trainer.preflight.plan
        seconds = trainer.training_s - self._started
        per_device = seconds * trainer.context.world_size * 1e12
        values = {
            "tokens": state.tokens,
            "loss": state.unlogged_loss / state.unlogged_steps,
            **{name: total / state.unlogged_steps for name, total in (state.unlogged_distillation or {}).items()},
            "grad_norm": state.grad_norm,
            "lr": state.lr,
            "step_time_s": seconds / len(steps),
            "tokens_per_s": sum(step.tokens for step in steps) / seconds,
            "tflops_per_device": operations_of(steps, plan.seq_length) / per_device,
            "tflops_per_device_whole_attention": operations_of(steps, plan.seq_length, True) / per_device,
            "peak_memory_bytes": largest_peak_memory_bytes(trainer.context.device),
        }
        if plan.sizes.has_ramp:
            values["samples"], values["global_batch_size"] = state.samples, steps[-1].samples
        if METHODS[config.model.variant].has_frozen:
            values["restarts"] = state.restarts
        if config.model.num_experts:
            totals = routing_totals(trainer.engine.chunks, trainer.context.device, state.unlogged_routing)
            values |= load_metrics(totals, config)
        if trainer.engine.guard:
            values["num_extra_checkpoints"] = trainer.engine.guard.added
        if config.faults.on_bad_step == "skip":
            values["skipped_steps"] = state.skipped
        return values


def operations_of(steps: Sequence[Step], seq_length: int, whole_attention: bool = False) -> float:
    """Floating-point operations of steps, of several phases if need be."""
    total = 0.0
    for model, of_model in groupby(steps, lambda step: step.model):
        samples, contexts = zip(*((step.samples, step.context) for step in of_model), strict=True)
        positions = seq_length * sum(samples)
        total += positions * flops_per_token(model, sum(contexts) / positions, whole_attention)
    return total


def opening_lines(trainer: Trainer) -> list[str]:
    """Lines before the first step."""
    preflight, config, device = trainer.preflight, trainer.config, trainer.context.device
    lines = [*preflight.remarks, cost_of_run(preflight)]
    if preflight.start is not None:
        lines.append(preflight.start.line)
    if preflight.checkpoint is not None:
        lines.append(f"continuing from {preflight.checkpoint}, step {trainer.state.step}")
        if trainer.state.samples:
            if trainer.checkpointer.changed_layout is not None:
                lines.append(changed_layout(config, trainer.checkpointer.changed_layout))
            changed = changed_glue(config, device, preflight.saved, preflight.state.get("versions", {}))
            lines += [f"warning: {changed}"] if changed else []
    lines.append(f"the layers' glue is computed by {glue_in_use(config, device)}")
    if device.type == "cuda":
        lines.append(describe_launches(config))
    if preflight.entropy is not None:
        lines.append(
            f"unigram entropy of the validation tokens: {preflight.entropy:.4f} nats "
            f"(perplexity {math.exp(preflight.entropy):.1f}): a loss below it shows that context is used"
        )
    return lines


def cost_of_run(preflight: Preflight) -> str:
    """Parameters, tokens and operations of the whole run, in one line."""
    config, plan, processes = preflight.config, preflight.plan, preflight.context.world_size
    model = config.model
    steps, ramp = config.training.train_steps, plan.ramp_line()
    tokens = plan.tokens_of_run(steps)
    flops = sum(
        flops_per_token(phase.config.model, plan.seq_length)
        * (plan.tokens_of_run(phase.stop) - plan.tokens_of_run(phase.start))
        for phase in planned_phases(config)
    )
    bound = "" if config.rank_schedule.energy is None else "at most "
    active = f" ({active_parameters(model):,} active)" if model.num_experts else ""
    return (
        f"{model.variant} ({model.architecture}) of {total_parameters(model):,} parameters{active} on {processes} "
        f"{'process' if processes == 1 else 'processes'}: {steps:,} steps x {plan.tokens_per_step:,} tokens"
        f"{f' ({ramp})' if ramp else ''} = {tokens:,} tokens, {bound}{flops:.2e} FLOP"
    )
