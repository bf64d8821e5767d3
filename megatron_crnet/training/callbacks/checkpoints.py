"""Saves the state of a run: by steps, by the clock, before it stops, and after the last step."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_crnet.checkpoint.directory import DAMAGED
from megatron_crnet.engine.expert_load import routing_totals
from megatron_crnet.training.callbacks.base import Callback, Step
from megatron_crnet.training.preflight import Preflight
from megatron_crnet.utils.errors import CheckpointError, FolderTakenError

if TYPE_CHECKING:
    from megatron_crnet.training.trainer import Trainer


class Checkpoints(Callback):
    """Saves in the background; before a stop and after the last step it waits until all is on disk."""

    def __init__(self, preflight: Preflight) -> None:
        minutes = preflight.config.checkpoint.save_interval_minutes
        # the clock of rank 0 decides for all
        self._interval_s = 60 * minutes if minutes and preflight.context.is_main else float("inf")
        self._saved_at = time.monotonic()
        self._saved_step = preflight.step if preflight.checkpoint else None

    def wants_save(self) -> bool:
        """See Callback."""
        return time.monotonic() - self._saved_at >= self._interval_s

    def on_start(self, trainer: Trainer) -> None:
        """Rename damaged checkpoints."""
        preflight = trainer.preflight
        if preflight.damaged:
            trainer.checkpointer.quarantine(preflight.step + (preflight.checkpoint is not None), DAMAGED)
        self._saved_at = time.monotonic()

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        """See Callback; before the validation, whose errors then do not cost the state."""
        interval = trainer.config.checkpoint.save_interval
        due = trainer.save_due or (interval and trainer.state.step % interval == 0)
        ends = trainer.stopping or trainer.is_last_step
        if due or ends:
            self._save(trainer, at_once=ends)

    def on_stop(self, trainer: Trainer) -> None:
        """See Callback."""
        if self._saved_step == trainer.state.step:
            _wait(trainer)
        else:
            self._save(trainer, at_once=True)

    def _save(self, trainer: Trainer, at_once: bool) -> None:
        """Save in the background, or return when all is on disk; then a failure is an error, else a warning."""
        self._saved_step = step = trainer.state.step
        started = self._saved_at = time.monotonic()
        settle(trainer)
        if trainer.config.model.num_experts:
            before, device = trainer.state.unlogged_routing, trainer.context.device
            counted = routing_totals(trainer.engine.chunks, device, before).tolist()
            trainer.state = replace(trainer.state, unlogged_routing=tuple(counted))
        trainer.checkpointer.save(trainer.state)
        if at_once:
            _wait(trainer)
        trainer.metrics.write(step, {"checkpoint_wait_s": time.monotonic() - started})


def settle(trainer: Trainer) -> None:
    """Wait for the checkpoint that is being written; warn if it could not be."""
    try:
        _wait(trainer)
    except FolderTakenError:
        raise
    except CheckpointError as error:
        trainer.progress.line(f"warning: {error}; training goes on")


def _wait(trainer: Trainer) -> None:
    """Wait until the last checkpoint is on disk, and print what was found about it."""
    trainer.context.heartbeat.report(f"the checkpoint of step {trainer.state.step}", may_take_long=True)
    trainer.checkpointer.wait()
    for remark in trainer.checkpointer.take_remarks():
        trainer.progress.line(f"warning: {remark}")
