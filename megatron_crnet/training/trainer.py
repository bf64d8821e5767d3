"""A training run: `run_training` sets the process up and gives it back, `Trainer` is the loop.

Work beside the steps is in callbacks, checks before anything is written are in preflight.py.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_crnet.checkpoint.directory import checkpoint_dir, checkpoint_name
from megatron_crnet.checkpoint.manager import Checkpointer
from megatron_crnet.checkpoint.train_state import TrainingState
from megatron_crnet.config.batch import BatchSizes
from megatron_crnet.config.phases import change_of_model, next_model, phase_at
from megatron_crnet.config.positions import position_table
from megatron_crnet.config.rank_rules import directions
from megatron_crnet.config.schema import Config
from megatron_crnet.data.documents import to_device
from megatron_crnet.data.loader import global_batches
from megatron_crnet.distributed.consensus import Vote, run_on_all_ranks
from megatron_crnet.distributed.process_groups import (
    all_groups,
    can_leave_groups,
    initialize_parallel,
    seed_random_states,
    shutdown_parallel,
)
from megatron_crnet.distributed.watchdog import report_lost_ranks
from megatron_crnet.engine.determinism import deterministic_algorithms
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.engine.expert_load import counts_so_far, go_on_from
from megatron_crnet.engine.rank_change import change_ranks
from megatron_crnet.engine.schedule import Batch, GlobalWork, global_work, loss_totals
from megatron_crnet.engine.spectrum import crosses, leading_share
from megatron_crnet.engine.state_kinds import KINDS, MASTER
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.training.callbacks.base import Callback, Step
from megatron_crnet.training.callbacks.checkpoints import Checkpoints
from megatron_crnet.training.callbacks.faults import NOTHING_TRAINED, FaultPolicy, detect_anomaly, losses_to_remember
from megatron_crnet.training.callbacks.profile import Profiler
from megatron_crnet.training.callbacks.results import Results, draw_loss
from megatron_crnet.training.callbacks.signals import StopOnSignal
from megatron_crnet.training.callbacks.step_log import StepLog
from megatron_crnet.training.evaluation import Evaluation, evaluate_checkpoint
from megatron_crnet.training.metrics import MetricsWriter, open_metrics
from megatron_crnet.training.preflight import Preflight, run_preflight
from megatron_crnet.training.progress import Progress
from megatron_crnet.utils.signals import Interruption


class Trainer:
    """The parts of one run on this rank, and its loop.

    Args:
        callbacks: called in this order.

    Attributes:
        state: counters, moved on by each step.
        stopping: whether the run stops after this step; a callback may set it before the last one, on all ranks alike.
        save_due: whether a callback of some rank wants a checkpoint of this step.
        training_s: seconds spent on batches and steps, without what callbacks took.
        losses: the last ones, by the names of TrainResult.
        teacher: this rank's part of it (`distillation`); None without one.
    """

    def __init__(self, preflight: Preflight, callbacks: Sequence[Callback]) -> None:
        config, self.context = preflight.config, preflight.context
        self.preflight, self.config, self.callbacks = preflight, config, callbacks
        start = preflight.start
        about = start.state if start and config.training.eval_only else preflight.state
        self.phase = phase_at(config, about.get("step", 0), about.get("rank_changes", ()))
        self.teacher = preflight.teacher.build(config) if preflight.teacher else None
        self.engine = self._build_engine()
        self.checkpointer = Checkpointer(config, self.engine, preflight.trained_on, preflight.folders.check)
        # another layout than the checkpoint's has no random states of its own to continue from
        seed_random_states(config.training.seed + preflight.step)
        self.state = self._load()
        self.engine.restore_schedule(max(self.state.step - self.phase.schedule_start, 0))
        self.engine.restarts = self.state.restarts
        if preflight.extends:
            self.engine.restart_if_due()  # there was nothing to restart for when the run ended here
            self.state = replace(self.state, restarts=self.engine.restarts)
        self.vote = Vote(self.wants_stop, lambda: any(callback.wants_save() for callback in callbacks))
        self.stopping = self.save_due = False
        self.training_s, self.losses = 0.0, dict[str, float]()
        total, done = (0, 0) if config.training.eval_only else (config.training.train_steps, self.state.step)
        self.progress = Progress(total, done, self.context.is_main)
        self.metrics = (
            MetricsWriter(config, is_main=False)
            if config.training.eval_only
            else run_on_all_ranks(partial(open_metrics, preflight, self.checkpointer.loaded_from, self.state.step))
        )

    def _build_engine(self) -> TrainEngine:
        config = self.phase.config
        return TrainEngine(config, build_model_chunks(config), self.context, self.teacher)

    def _begin_next_phase(self) -> None:
        """Hand the weights on to the engine of the next phase."""
        self.context.heartbeat.report(f"the next phase, after step {self.state.step}", may_take_long=True)
        following = phase_at(self.config, self.state.step, self.state.rank_changes)
        states = self.engine.states(KINDS if following.continues else (MASTER,))
        adam_steps = self.engine.zero.steps if following.continues else 0
        counts = counts_so_far(self.engine.chunks)
        self.engine.close()
        self.engine.zero.release()  # before the next one takes memory
        self.checkpointer.detach()
        del self.engine
        gc.collect()
        before, self.phase = self.phase, following
        self.engine = self._build_engine()
        if following.continues:
            for chunk in self.engine.chunks:
                change_ranks(states, chunk, self.config.training.seed, self.context.device)
        self.engine.start_from(states, adam_steps)
        go_on_from(counts, self.engine.chunks)
        self.engine.restore_schedule(self.state.step - following.schedule_start)
        self.checkpointer.attach(self.engine)
        self.state = replace(self.state, recent_losses=())  # beside which those of other ranks may all be spikes
        self.progress.line(f"step {self.state.step}: {change_of_model(before, following)}")

    def _crosses_threshold(self) -> bool:
        """Whether ranks change after this step by `rank_schedule.energy`; a collective call where it is measured."""
        step, threshold = self.state.step, self.config.rank_schedule.energy
        following = next_model(self.config, step, self.state.rank_changes)
        if threshold is None or following is None:
            return False
        self.context.heartbeat.report(f"the spectra after step {step}", may_take_long=True)
        before, after = position_table(self.phase.config.model), position_table(following)
        share, grows = leading_share(self.engine.zero, self.engine.chunks, after), True in directions(before, after)
        self.metrics.write(step, {"rank_energy": share})
        found = f"the leading half of the ranks holds {share:.4f}" if grows else f"the next ranks keep {share:.4f}"
        limit = f"ranks grow at {threshold:g} or less" if grows else f"ranks shrink at {threshold:g} or more"
        self.progress.line(f"step {step}: {found} of the energy; {limit}")
        return crosses(share, threshold, grows)

    def _load(self) -> TrainingState:
        """Fill weights and optimizer from what the preflight found. Returns the counters."""
        start, checkpoint = self.preflight.start, self.preflight.checkpoint
        if start is None:
            if checkpoint is None:
                return TrainingState()
            if not self.config.training.eval_only:
                return self.checkpointer.load(checkpoint)
            self.checkpointer.load_initial(checkpoint, optimizer=False)
            return TrainingState.from_values(self.preflight.state)
        self.checkpointer.load_initial(start.checkpoint, start.optimizer)
        self.checkpointer.loaded_from = start.facts
        # eval_only keeps the counters of the run that it evaluates
        if self.config.training.eval_only:
            return TrainingState.from_values(start.state)
        # of the loaded weights, whose next draws must be others
        return TrainingState(restarts=start.state.get("restarts", 0))

    def run(self) -> None:
        """Train from the loaded state to the last step, or until a callback stops the run."""
        heartbeat, folder = self.context.heartbeat, Path(self.config.logging.output_dir)
        heartbeat.stacks = folder / "stacks" / f"rank_{self.context.rank:05d}.txt"
        with self.metrics, heartbeat.watching(self.preflight.timeout_s), self.progress:
            self._call("on_start")
            self._train()
            self._call("on_stop" if self.stopping else "on_complete")
        self.progress.close()
        self._call("on_end")
        # a launcher ends all ranks when the first has ended, and rank 0 must have closed its files by then
        loss_totals([], self.context.device)

    def _train(self) -> None:
        if self.stopping:
            return
        remaining = self.config.training.train_steps - self.state.step
        dataset, sizes = self.preflight.datasets.train, self.preflight.plan.sizes
        if self.preflight.extends:
            self._change_ranks_if_due()  # at the run's former end, nothing was measured
        self._call("on_step_begin")
        started = time.perf_counter()
        for batches in self.batches(dataset, self.state.samples, remaining, sizes):
            step = self._step(batches)
            self.training_s += time.perf_counter() - started
            self._call("on_step_end", step)
            if self.stopping:
                return
            self._call("on_step_begin")
            started = time.perf_counter()

    def _step(self, batches: list[Batch]) -> Step:
        """One step, after which `state` counts it, also if it was skipped."""
        # compilation and DeepSpeed's tracing make the first step slow
        first = self.state.step in (self.preflight.step, self.phase.start)
        self.context.heartbeat.report(f"step {self.state.step + 1}", may_take_long=first)
        samples, model, work = self.step_size, self.phase.config.model, self._work(batches)
        loss, trained = self._train_or_skip(batches, work.trained)
        self.engine.restart_if_due()  # a bad step that ends the run has saved the state before
        self._plan_next_step()
        stop, self.save_due = self.vote.answers
        self.stopping = stop and not self.is_last_step  # else the run ends anyway
        return Step(loss, samples, trained, work.context, model)

    def _train_or_skip(self, batches: list[Batch], tokens: int) -> tuple[float, int]:
        """Update the weights, or leave them to `on_bad_step`. Returns the loss and the number of trained tokens."""
        samples, lr, faults = self.step_size, self.engine.current_lr, self.config.faults
        routed = counts_so_far(self.engine.chunks)
        loss = self.engine.forward_backward(batches, tokens, self.vote)
        problem = detect_anomaly(loss, self.state.recent_losses, faults) if tokens else NOTHING_TRAINED
        if problem is None:
            grad_norm, _ = self.engine.update()
            if not math.isfinite(grad_norm):
                problem = f"the loss is {loss:.4f} and the gradient norm {grad_norm}, but must be finite"
        elif faults.on_bad_step == "skip":
            self.engine.discard()
        if problem is not None:
            go_on_from(routed, self.engine.chunks)
            self._call("on_bad_step", problem, lr)
            return loss, 0
        self.losses["train_loss"] = loss
        self.state = self.state.trained(
            samples=samples,
            tokens=tokens,
            loss=loss,
            distillation=self.engine.distillation_losses,
            grad_norm=grad_norm,
            lr=lr,
            window=losses_to_remember(faults),
        )
        return loss, tokens

    def _plan_next_step(self) -> None:
        """Note what is due after a step: a validation, other ranks, the next phase."""
        due = self.preflight.is_validated(self.state.step)
        self.state = replace(self.state, validation_due=due, restarts=self.engine.restarts)
        self._change_ranks_if_due()

    def _change_ranks_if_due(self) -> None:
        if self._crosses_threshold():
            self.state = replace(self.state, rank_changes=(*self.state.rank_changes, self.state.step))
        if self.state.step in (self.phase.stop, *self.state.rank_changes[-1:]) and not self.is_last_step:
            self._begin_next_phase()

    def _work(self, batches: list[Batch]) -> GlobalWork:
        """What the global batch holds; padding, ends of documents and their lengths differ by rank."""
        length, data = self.preflight.plan.seq_length, self.config.data
        if data.sample_format == "packed" and not (data.eod_mask_loss or data.reset_attention_mask):
            positions = self.step_size * length
            return GlobalWork(positions, positions * length)
        return global_work(batches, self.context.device)

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)

    def wants_stop(self) -> bool:
        """Whether a callback of this rank wants the run to stop."""
        return any(callback.wants_stop() for callback in self.callbacks)

    @property
    def step_size(self) -> int:
        """Sequences of the step to come, or that is under way."""
        return self.preflight.plan.sizes.at(self.state.samples)

    @property
    def is_last_step(self) -> bool:
        """Whether the step just done is the last one."""
        return self.state.step == self.config.training.train_steps

    @property
    def newest_checkpoint(self) -> Path:
        """Where the state of this step is saved when the run has ended."""
        return checkpoint_dir(self.config) / checkpoint_name(self.state.step)

    def batches(
        self, dataset: Any, first_sample: int, steps: int, sizes: BatchSizes | None = None
    ) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each of `steps` global batches, on its device; see `global_batches`."""
        plan = self.preflight.plan
        for batches in global_batches(
            dataset,
            first_sample=first_sample,
            global_batch_size=plan.global_batch_size,
            micro_batch_size=plan.micro_batch_size,
            dp_rank=self.context.dp_rank,
            dp_size=plan.dp_size,
            num_workers=self.config.data.num_workers,
            num_steps=steps,
            sizes=sizes,
        ):
            yield [to_device(batch, self.context.device) for batch in batches]


def default_callbacks(preflight: Preflight, interruption: Interruption) -> list[Callback]:
    """The callbacks of every run. A state is saved before the validation of the same step."""
    return [
        StopOnSignal(interruption, preflight.folders),
        FaultPolicy(),
        StepLog(),
        Checkpoints(preflight),
        Evaluation(),
        Results(),
    ]


@dataclass(frozen=True)
class TrainResult:
    """What `run_training` returns, the same on every rank.

    Attributes:
        complete: whether all steps are done; False where a signal or a callback stopped the run, whose state is saved.
        step: last step done.
        checkpoint: newest checkpoint of the run, or the one that `training.eval_only` evaluated.
        train_loss: of the last good step of this call, nats per token; None if it took none.
        validation_loss, test_loss: last ones of this call, nats per token; None if there was none.
    """

    complete: bool
    step: int
    checkpoint: Path | None
    train_loss: float | None = None
    validation_loss: float | None = None
    test_loss: float | None = None


def run_training(
    config: Config, *, callbacks: Sequence[Callback] = (), interruption: Interruption | None = None
) -> TrainResult:
    """Run a configuration on the ranks that the launcher started, or alone in this process.

    Joins the process groups, watches over the other ranks and handles signals while it runs, and gives all of them
    back: groups that the caller has set up stay, and nobody watches over their ranks. Where leaving groups may wait for
    ranks that do not come, they stay as well: after a lost rank, a defect on this rank of several, and with NCCL any
    error of several ranks. End the process then.

    Args:
        callbacks: called after those of every run, in each hook.
        interruption: the signal handlers of the caller. By default this function takes SIGTERM, SIGUSR1 and SIGINT
            itself from the first step to its end, where it is called in the main thread.

    Raises:
        ConfigError, DataError: the input cannot be used; nothing has been written.
        CheckpointError: the saved state does not fit, or the last one cannot be written.
        PeerLostError: another rank died or is stalled.
        BadStepError: a loss is not finite or a spike; the state before it is saved.
    """
    before = all_groups()
    with (
        deterministic_algorithms(config.training.deterministic),
        nullcontext(interruption) if interruption else Interruption(from_start=False) as signals,
    ):
        try:
            context = initialize_parallel(config)
            limit = config.parallel.distributed_timeout_minutes
            with (
                context.heartbeat,
                report_lost_ranks(context.heartbeat, limit),
                run_preflight(config, context) as preflight,
            ):
                result = _run(preflight, signals, callbacks)
        except Exception as error:
            shutdown_parallel(before if can_leave_groups(error) else all_groups())
            raise
        shutdown_parallel(before)
        return result


def _run(preflight: Preflight, interruption: Interruption, callbacks: Sequence[Callback]) -> TrainResult:
    config = preflight.config
    if preflight.is_complete and not config.training.eval_only:
        draw_loss(preflight)
        Progress(0, 0, preflight.context.is_main).line(
            f"{preflight.checkpoint} has all {config.training.train_steps} steps already: nothing to do; "
            f"raise training.train_steps to go on, or remove {checkpoint_dir(config)} to start again"
        )
        return TrainResult(True, preflight.step, preflight.checkpoint)
    if config.training.eval_only:
        trainer = Trainer(preflight, ())
        checkpoint = evaluate_checkpoint(trainer)
        trainer.engine.close()
        return TrainResult(True, trainer.state.step, checkpoint, **trainer.losses)
    profiler = Profiler(preflight)
    trainer = Trainer(preflight, [profiler, *default_callbacks(preflight, interruption), *callbacks])
    try:
        trainer.run()
    finally:
        profiler.abandon()
    trainer.engine.close()
    return TrainResult(not trainer.stopping, trainer.state.step, trainer.newest_checkpoint, **trainer.losses)
