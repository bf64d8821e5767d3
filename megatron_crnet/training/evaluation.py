"""Mean losses on data that is not trained on: validation, the final test, and `training.eval_only`."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_crnet.distributed.consensus import Vote, on_any_rank, run_on_main
from megatron_crnet.engine.schedule import loss_totals
from megatron_crnet.training.callbacks.base import Callback, Step, as_warning
from megatron_crnet.utils.errors import ConfigError, cannot_be_written

if TYPE_CHECKING:
    from megatron_crnet.training.trainer import Trainer


class Evaluation(Callback):
    """Validates every `training.eval_interval` steps and after the last one, and tests the final weights."""

    def on_start(self, trainer: Trainer) -> None:
        """Make up for a validation that a signal has cut short in the previous run."""
        if trainer.preflight.validation_due:
            _validate(trainer, to_the_end=False)

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        """See Callback."""
        if trainer.state.validation_due and not trainer.stopping:
            _validate(trainer, to_the_end=trainer.is_last_step)

    def on_complete(self, trainer: Trainer) -> None:
        """Test, to the end whatever signals come: all is saved by now."""
        preflight = trainer.preflight
        if preflight.datasets.test is not None:
            evaluate(trainer, "test", preflight.datasets.test, preflight.test_steps)


def _validate(trainer: Trainer, to_the_end: bool) -> None:
    dataset, steps = trainer.preflight.datasets.valid, trainer.config.training.eval_steps
    if evaluate(trainer, "validation", dataset, steps, to_the_end) is None:
        trainer.stopping = True
    else:
        trainer.state = replace(trainer.state, validation_due=False)


def evaluate(trainer: Trainer, what: str, dataset: Any, steps: int, to_the_end: bool = True) -> dict[str, float] | None:
    """Mean loss over all tokens of the first `steps` global batches of `dataset`, into the metrics and the log.

    An error, other than that of a lost rank, is a warning: it must not end the training.

    Args:
        what: name of the metric.
        to_the_end: ignore signals.

    Returns:
        The metrics, empty after an error; None if a signal cut it short.
    """
    state, name = trainer.state, f"the {what} of step {trainer.state.step}"
    totals = _totals(trainer, what, dataset, steps, to_the_end)
    if not totals:
        return None if totals is None else {}
    count = sum(count for _, count in totals)
    if not count:
        trainer.progress.line(f"warning: {name} has no token whose loss counts")
        return {}
    loss = sum(total for total, _ in totals) / count
    # e^700 is the largest power a float holds
    perplexity = math.exp(min(loss, 700.0))
    values = {"tokens": state.tokens, f"{what}_loss": loss, f"{what}_perplexity": perplexity}
    trainer.losses[f"{what}_loss"] = loss
    trainer.metrics.write(state.step, values)
    entropy = trainer.preflight.entropy if what == "validation" else None
    trainer.progress.line(
        f"step {state.step} | {what} loss {loss:.4f} | {what} perplexity {perplexity:.2f}"
        f"{'' if entropy is None else f' | unigram entropy {entropy:.4f}'}"
    )
    return values


def _totals(
    trainer: Trainer, what: str, dataset: Any, steps: int, to_the_end: bool
) -> list[tuple[float, float]] | None:
    """Loss sum and tokens of each batch over all ranks; empty after an error on some rank, None after a signal."""
    step, failed = trainer.state.step, False
    vote, totals = Vote(trainer.wants_stop, lambda: failed), []
    batches = trainer.batches(dataset, 0, steps)
    for number in range(1, steps + 1):
        trainer.context.heartbeat.report(f"step {step}, batch {number} of its {what}")
        losses, failed, batch = [], True, None
        with as_warning(trainer.preflight, f"the {what} of step {step}"):
            batch, failed = next(batches), False
        # ranks of a stage, of a tensor-parallel group, of ZeRO-3 and of experts wait for each other within a pass
        failed = on_any_rank(failed, trainer.context.device)
        with as_warning(trainer.preflight, f"the {what} of step {step}"):
            if batch is not None and not failed:
                failed = True
                losses, failed = trainer.engine.evaluation_losses(batch), False
        # the other ranks wait for this call whatever has failed here
        totals.append(loss_totals(losses, trainer.context.device, vote))
        stop, failed = vote.answers
        if stop and not to_the_end:
            return None
        if failed:
            return []
    return totals


def evaluate_checkpoint(trainer: Trainer) -> Path | None:
    """Measure the losses of what was loaded, print them and add them to evaluations.jsonl. Returns the checkpoint."""
    preflight, step = trainer.preflight, trainer.state.step
    checkpoint = preflight.start.checkpoint if preflight.start else preflight.checkpoint
    for line in (*preflight.remarks, f"evaluating {checkpoint}, step {step}"):
        trainer.progress.line(line)
    values: dict[str, Any] = {"step": step, "checkpoint": str(checkpoint)}
    datasets = preflight.datasets
    with trainer.context.heartbeat.watching(preflight.timeout_s):
        if datasets.valid is not None:
            values |= evaluate(trainer, "validation", datasets.valid, preflight.config.training.eval_steps) or {}
        if datasets.test is not None:
            values |= evaluate(trainer, "test", datasets.test, preflight.test_steps) or {}
    path = Path(preflight.config.logging.output_dir) / "evaluations.jsonl"
    run_on_main(lambda: _append(path, values))
    return checkpoint


def _append(path: Path, values: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        raise ConfigError(cannot_be_written(path, error, "choose another logging.output_dir")) from error
