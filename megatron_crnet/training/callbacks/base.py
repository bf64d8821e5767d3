"""The hooks of the training loop, in the order in which the loop calls them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_crnet.config.schema import ModelConfig
from megatron_crnet.distributed.watchdog import is_communication
from megatron_crnet.training.preflight import Preflight
from megatron_crnet.utils.errors import describe

if TYPE_CHECKING:
    from megatron_crnet.training.trainer import Trainer


@dataclass(frozen=True)
class Step:
    """One step that is done.

    Attributes:
        loss: mean over the trained tokens of the global batch, nats; of a skipped step as well.
        samples: sequences of the global batch.
        tokens: trained tokens; 0 if the step was skipped.
        context: sum over all positions, trained or not, of the tokens that attention reaches over.
        model: that of the step's phase.
    """

    loss: float
    samples: int
    tokens: int
    context: float
    model: ModelConfig


class Callback:
    """Work beside the steps; override the hooks that are needed.

    All ranks call every hook in the same order, callback after callback, so a hook may contain collective calls. An
    exception ends the run: what must not end it goes into `as_warning`. A CrnetError has to be raised on all ranks
    alike (`consensus.run_on_all_ranks`, `run_on_main`). Without a step to take, that is under `training.eval_only` and
    where all steps are done, no hook is called.
    """

    def on_start(self, trainer: Trainer) -> None:
        """The state is loaded and the files of the run are open."""

    def wants_stop(self) -> bool:
        """Asked on each rank in each step and batch of a validation: True on any of them stops the run."""
        return False

    def wants_save(self) -> bool:
        """Asked on each rank in each step: True on any rank saves a checkpoint of this step."""
        return False

    def on_bad_step(self, trainer: Trainer, problem: str, lr: float) -> None:
        """A step would do harm and has changed no weight; the first callback, FaultPolicy, has skipped it or raised."""

    def on_step_begin(self, trainer: Trainer) -> None:
        """A step is about to fetch its batch; not called where the run stops."""

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        """`trainer.state` counts the step; `trainer.stopping` says whether the run stops after it."""

    def on_stop(self, trainer: Trainer) -> None:
        """The run stops before its last step."""

    def on_complete(self, trainer: Trainer) -> None:
        """All steps are done and saved."""

    def on_end(self, trainer: Trainer) -> None:
        """After `on_stop` or `on_complete`, no longer under the watchdog; the metrics are closed."""


@contextmanager
def as_warning(preflight: Preflight, what: str) -> Iterator[None]:
    """Turn an error into a warning, except that of a lost rank and all of `training.eval_only`."""
    try:
        yield
    except Exception as error:
        if is_communication(error) or preflight.config.training.eval_only:
            raise
        at = "" if preflight.context.is_main else f" (rank {preflight.context.rank})"
        print(f"warning{at}: {what} failed and is left out: {describe(error)}", file=sys.stderr, flush=True)
