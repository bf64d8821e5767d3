"""The training loop: batches in, optimizer steps, validation, checkpoints, metrics."""

from __future__ import annotations

import json
import math
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_crnet.checkpoint.directory import DAMAGED, checkpoint_dir, checkpoint_name, saved_step
from megatron_crnet.checkpoint.manager import Checkpointer, saved_facts
from megatron_crnet.checkpoint.run_folder import RunFolders, check_space, hold_run_folders
from megatron_crnet.checkpoint.train_state import StepResult, TrainingState
from megatron_crnet.config.batch import BatchPlan, check_memory, plan_batches
from megatron_crnet.config.batch_sizes import BatchSizes
from megatron_crnet.config.loading import save_config
from megatron_crnet.config.model_size import flops_per_token
from megatron_crnet.config.schema import Config
from megatron_crnet.data.documents import to_device
from megatron_crnet.data.loader import global_batches
from megatron_crnet.distributed.consensus import Vote, examine_together, report_together
from megatron_crnet.distributed.process_groups import (
    ParallelContext,
    initialize_parallel,
    seed_random_states,
    shutdown_parallel,
)
from megatron_crnet.distributed.watchdog import is_communication, naming_lost_peers
from megatron_crnet.engine.determinism import deterministic_algorithms
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.engine.schedule import Batch, GlobalWork, global_work, loss_totals
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.training.bad_steps import NOTHING_TRAINED, losses_to_remember, passed_limit, problem_of_loss
from megatron_crnet.training.metrics import MetricsWriter, Progress, check_sinks, cost_of_run, largest_peak_memory_bytes
from megatron_crnet.training.plot import plot_loss, validated_steps
from megatron_crnet.training.preflight import examine_inputs
from megatron_crnet.training.residual_in_use import changed_residual, residual_in_use
from megatron_crnet.training.resumption import other_place
from megatron_crnet.training.sampling import continue_text
from megatron_crnet.utils.environment import read_run_file, write_run_file
from megatron_crnet.utils.errors import (
    BadStepError,
    CheckpointError,
    ConfigError,
    CrnetError,
    FolderTakenError,
    PeerLostError,
    describe,
)
from megatron_crnet.utils.signals import Interruption


@dataclass
class LoggingWindow:
    """Work and time of this process since the last metric line; `started` moves on by what is no training.

    Attributes:
        steps: all of them, also the skipped ones.
        samples: sequences of these steps.
        step_size: sequences of the last one.
        tokens: trained ones.
        context: sum over all positions, trained or not, of the tokens that attention reaches over.
    """

    started: float
    steps: int = 0
    samples: int = 0
    step_size: int = 0
    tokens: int = 0
    context: float = 0.0

    def add(self, samples: int, tokens: int, context: float) -> None:
        """Count one step."""
        self.steps += 1
        self.samples += samples
        self.step_size = samples
        self.tokens += tokens
        self.context += context


class Trainer:
    """One run of one configuration on this rank.

    Everything that can be wrong with the input is found in here, before anything is written into the run's folder.

    Args:
        folders: those of the run, held against other writers.
    """

    def __init__(
        self, config: Config, context: ParallelContext, interruption: Interruption, folders: RunFolders
    ) -> None:
        self.config, self.context, self.interruption, self.folders = config, context, interruption, folders
        self.plan: BatchPlan = plan_batches(config, context.world_size)
        self.losses: dict[str, float] = {}
        examine_together(self._check_machine)
        self.inputs = examine_inputs(config, self.plan, context.device)
        self.validation_due = self._is_validation_due()
        self.space = None if self.is_complete or config.training.eval_only else examine_together(self._check_space)

    @property
    def is_complete(self) -> bool:
        """Whether an earlier run has done all steps already, and their last validation."""
        return self.inputs.step >= self.config.training.train_steps and not self.validation_due

    def _is_validation_due(self) -> bool:
        """Whether the checkpoint's step is still to be validated, as rank 0's metrics say; a collective call."""
        metrics = Path(self.config.logging.output_dir) / "metrics.jsonl"
        reads = self.context.is_main and self.inputs.state.get("validation_due")
        due, *_ = report_together(lambda: bool(reads) and self.inputs.step not in validated_steps(metrics))
        return due and self._validates(self.inputs.step)

    def run(self) -> TrainResult:
        """Train from the newest checkpoint, or from scratch."""
        self.engine = TrainEngine(self.config, build_model_chunks(self.config), self.context)
        self.checkpointer = Checkpointer(self.config, self.engine, self.inputs.trained_on, self.folders.check)
        self.vote = Vote(self._is_warned, self._is_time_to_save)
        # another layout than the checkpoint's has no random states of its own to continue from
        seed_random_states(self.config.training.seed + self.inputs.step)
        checkpoint = self.inputs.checkpoint
        self.state = self._load()
        self.engine.restore_schedule(self.state.step)
        self.progress = Progress(self.config.training.train_steps, self.state.step, self.context.is_main)
        with examine_together(self._open_folder) as self.metrics:
            self._announce()
            self.context.heartbeat.stacks = (
                Path(self.config.logging.output_dir) / "stacks" / f"rank_{self.context.rank:05d}.txt"
            )
            limit_s = 60 * self.config.parallel.distributed_timeout_minutes
            self.interruption.arm()
            if self.inputs.damaged:
                self.checkpointer.set_aside(self.inputs.step + (checkpoint is not None), DAMAGED)
            with self.context.heartbeat.watching(limit_s), self.progress:
                complete = self._train()
                if complete and self.inputs.datasets.test is not None:
                    self._test()  # when all is saved
        self.progress.close()
        self._finish() if complete else self._take_leave()
        # a launcher ends all ranks when the first has ended: none goes before rank 0 has closed its files
        loss_totals([], self.context.device)
        newest = checkpoint_dir(self.config) / checkpoint_name(self.state.step)
        return TrainResult(complete, self.state.step, newest, **self.losses)

    def _check_machine(self) -> tuple[None, dict[str, str]]:
        check_memory(self.config, self.context.device)
        if self.context.is_main:
            check_sinks(self.config)
        return None, {}

    def _check_space(self) -> tuple[str | None, dict[str, str]]:
        return check_space(self.config, self.inputs.step) if self.context.is_main else None, {}

    def _load(self) -> TrainingState:
        """Fill weights and optimizer from what the inputs found. Returns the counters."""
        start = self.inputs.start
        if start is not None:
            self.checkpointer.load_initial(start.checkpoint, start.optimizer)
            self.checkpointer.loaded_from = start.facts
            return TrainingState()
        return self.checkpointer.load(self.inputs.checkpoint) if self.inputs.checkpoint else TrainingState()

    def evaluate_only(self) -> TrainResult:
        """Measure the losses of what the inputs found, print them and add them to evaluations.jsonl."""
        self.engine = TrainEngine(self.config, build_model_chunks(self.config), self.context)
        self.checkpointer = Checkpointer(self.config, self.engine, self.inputs.trained_on)
        start = self.inputs.start
        checkpoint = start.checkpoint if start else self.inputs.checkpoint
        self._load()
        # where the weights stand, whatever a run would make of them
        self.state = TrainingState.from_values(start.state if start else self.inputs.state)
        self.engine.restore_schedule(self.state.step)
        self.progress, self.metrics = Progress(0, 0, self.context.is_main), MetricsWriter(self.config, is_main=False)
        self._announce_remarks()
        self.progress.line(f"evaluating {checkpoint}, step {self.state.step}")
        values: dict[str, Any] = {"step": self.state.step, "checkpoint": str(checkpoint)}
        limit_s = 60 * self.config.parallel.distributed_timeout_minutes
        valid, test = self.inputs.datasets.valid, self.inputs.datasets.test
        with self.context.heartbeat.watching(limit_s):
            if valid is not None:
                values |= self._evaluate("validation", valid, self.config.training.eval_steps) or {}
            if test is not None:
                values |= self._evaluate("test", test, self.inputs.test_steps) or {}
        examine_together(lambda: self._add_evaluation(values))
        return TrainResult(True, self.state.step, checkpoint, **self.losses)

    def _add_evaluation(self, values: dict[str, Any]) -> tuple[None, dict[str, str]]:
        if not self.context.is_main:
            return None, {}
        path = Path(self.config.logging.output_dir) / "evaluations.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written ({error.strerror or error}): choose another logging.output_dir"
            ) from error
        return None, {}

    def _open_folder(self) -> tuple[MetricsWriter, dict[str, str]]:
        """The first thing that is written; an error reaches every rank."""
        folder, wandb_id = Path(self.config.logging.output_dir), None
        try:
            if self.context.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                save_config(self.config, folder / "config.yaml")
                newest = self.inputs.step if self.inputs.checkpoint else None
                facts: dict[str, Any] = {"checkpoints": saved_facts(self.config, newest)}
                if self.checkpointer.loaded_from:
                    facts["loaded_from"] = self.checkpointer.loaded_from
                if self.config.logging.wandb_project:
                    # a run that goes on is one run there, too
                    before = read_run_file(folder).get("wandb_id") if self.inputs.checkpoint else None
                    facts["wandb_id"] = wandb_id = before if isinstance(before, str) else secrets.token_hex(8)
                write_run_file(folder, sys.argv, self.context.world_size, **facts)
            return MetricsWriter(self.config, self.context.is_main, self.state.step, wandb_id), {}
        except OSError as error:
            raise ConfigError(
                f"logging.output_dir {folder} cannot be written ({error.strerror or error}): free some space, correct "
                "the permissions or choose another folder"
            ) from error

    def _announce_remarks(self) -> None:
        warnings = (*self.inputs.damaged, *([self.space] if self.space else []))
        for line in (*(f"warning: {line}" for line in warnings), *self.inputs.remarks):
            self.progress.line(line)

    def _announce(self) -> None:
        self._announce_remarks()
        self.progress.line(cost_of_run(self.config, self.plan, self.context.world_size))
        if self.inputs.start is not None:
            self.progress.line(self.inputs.start.line)
        if self.inputs.checkpoint is not None:
            self.progress.line(f"continuing from {self.inputs.checkpoint}, step {self.state.step}")
            if self.state.samples:
                if self.checkpointer.other_place is not None:
                    self.progress.line(other_place(self.config, self.checkpointer.other_place))
                self._warn_of_another_residual()
        if self.config.model.variant == "crnet":
            self.progress.line(f"the residual is computed by {residual_in_use(self.config, self.context.device)}")
        if self.inputs.entropy is not None:
            self.progress.line(
                f"unigram entropy of the validation tokens: {self.inputs.entropy:.4f} nats "
                f"(perplexity {math.exp(self.inputs.entropy):.1f}): a loss below it shows that context is used"
            )

    def _warn_of_another_residual(self) -> None:
        versions = self.inputs.state.get("versions", {})
        changed = changed_residual(self.config, self.context.device, self.inputs.saved, versions)
        if changed is not None:
            self.progress.line(f"warning: {changed}")

    def _train(self) -> bool:
        """Returns whether all steps are done; not so after a signal, whose state is saved."""
        training, window, first = self.config.training, LoggingWindow(time.perf_counter()), True
        self._saved_at = time.monotonic()
        if self.validation_due and not self._validate():
            return False
        remaining = training.train_steps - self.state.step
        for batches in self._batches(self.inputs.datasets.train, self.state.samples, remaining, self.plan.sizes):
            # compilers and DeepSpeed's tracing take their time over the first step
            self.context.heartbeat.report(f"step {self.state.step + 1}", may_take_long=first)
            first = False
            seen, work = self.state.samples, self._work(batches)
            tokens = self._step(batches, work.trained)
            window.add(self.state.samples - seen, tokens, work.context)
            step, last = self.state.step, self.state.step == training.train_steps
            if self.state.unlogged_steps and (step % self.config.logging.log_interval == 0 or step == 1 or last):
                self.progress.advance(step, self._log(window))
                self.state, window = self.state.logged(), LoggingWindow(time.perf_counter())
            else:
                self.progress.advance(step, None)
            paused = time.perf_counter()
            warned, due = self.vote.answers
            warned = warned and not last  # the run ends anyway
            # saved first: nothing that goes wrong in a validation costs the state
            saves, validates = warned or due or last or self._saves(step), self._validates(step)
            self.state = replace(self.state, validation_due=validates)
            if saves:
                self._save(at_once=warned or last)
            if warned:
                return False
            if validates and not self._validate(to_the_end=last):
                self._wait_for_checkpoint() if saves else self._save(at_once=True)
                return False
            window.started += time.perf_counter() - paused
        return True

    def _is_warned(self) -> bool:
        """Whether this rank is to stop, by a signal or another writer."""
        return self.interruption.received is not None or self.folders.taken

    def _is_time_to_save(self) -> bool:
        """By the clock of rank 0, which decides for all."""
        minutes = self.config.checkpoint.save_interval_minutes
        return self.context.is_main and minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes

    def _save(self, at_once: bool) -> None:
        """Save in the background, or return when all is on disk; then a failure is an error, else a warning."""
        started = self._saved_at = time.monotonic()
        self._settle()
        self.checkpointer.save(self.state)
        if at_once:
            self._wait_for_checkpoint()
        self.metrics.write(self.state.step, {"checkpoint_wait_s": time.monotonic() - started})

    def _settle(self) -> None:
        """Wait for the checkpoint that is being written; say so if it could not be."""
        try:
            self._wait_for_checkpoint()
        except FolderTakenError:
            raise
        except CheckpointError as error:
            self.progress.line(f"warning: {error}; training goes on")

    def _wait_for_checkpoint(self) -> None:
        """Wait until it is on disk, and say what was found about it."""
        self.context.heartbeat.report(f"the checkpoint of step {self.state.step}", may_take_long=True)
        self.checkpointer.wait()
        for remark in self.checkpointer.take_remarks():
            self.progress.line(f"warning: {remark}")

    def _step(self, batches: list[Batch], tokens: int) -> int:
        """One step, after which `state` counts it. Returns its trained tokens, 0 for a bad one that was skipped.

        Args:
            tokens: the trained tokens of the global batch.
        """
        lr = self.engine.current_lr
        loss, faults = self.engine.forward_backward(batches, tokens, self.vote), self.config.faults
        problem = problem_of_loss(loss, self.state.recent_losses, faults) if tokens else NOTHING_TRAINED
        if problem is None:
            grad_norm, _ = self.engine.update()
            if math.isfinite(grad_norm):
                result, window = StepResult(loss, grad_norm, lr, tokens), losses_to_remember(faults)
                self.state = self.state.trained(self._step_size, result, window)
                self.losses["train_loss"] = loss
                return tokens
            problem = f"the loss is {loss:.4f} and the gradient norm {grad_norm}, but must be finite"
        elif faults.on_bad_step == "skip":
            self.engine.discard()
        self._pass_over(problem, lr)
        return 0

    def _pass_over(self, problem: str, lr: float) -> None:
        """Count a bad step, or stop on every rank alike. It has changed no weight; what led to it may have."""
        faults = self.config.faults
        skipped = self.state.passed_over(self._step_size)
        limit = passed_limit(skipped, faults)
        if faults.on_bad_step == "skip" and limit is None:
            self.state = skipped
            self.metrics.write(skipped.step, {"skipped_steps": skipped.skipped})
            self.progress.line(
                f"warning: step {skipped.step} is skipped: {problem} (learning rate {lr:.3e}); {skipped.skipped} of at "
                f"most faults.max_skips {faults.max_skips}"
            )
            return
        self._stop(problem if faults.on_bad_step == "stop" else f"{problem}, and {limit}", lr)

    def _stop(self, problem: str, lr: float) -> None:
        """End the run with the state before the bad step saved, but not as one to continue from.

        The next start goes back to a checkpoint whose next step was good.
        """
        back, stuck = None, ""
        try:  # whatever fails here must not hide what was wrong with the step
            self._settle()
            back = self.checkpointer.step_back(self.state.good_step)
        except CheckpointError as error:
            stuck = (
                f"checkpoints of step {self.state.good_step} and later could not be set aside ({error}): rename them, "
                "or a new start continues from the newest"
            )
        try:
            self.checkpointer.save(self.state, aside=True)
            aside = self.checkpointer.wait()
            kept = f"is kept beside it as {aside.name}" if aside else "is not kept"
        except CheckpointError as error:
            aside, kept = None, f"is lost ({error})"
        norm = "none yet" if self.engine.last_grad_norm is None else f"{self.engine.last_grad_norm:.4g}"
        skipping = "" if self.config.faults.on_bad_step == "skip" else ", or skip such steps (faults.on_bad_step skip)"
        raise BadStepError(
            f"{problem} at step {self.state.step + 1} (learning rate {lr:.3e}, last gradient norm {norm}): lower "
            f"optimizer.lr or look at the data of this step{skipping}{self._remedy()}; "
            f"{stuck or self._next_start(back, aside)}; the state just before this step {kept}"
        )

    def _next_start(self, back: Path | None, aside: Path | None) -> str:
        """What a new start does after a bad step."""
        if back is not None:
            no_older = ", as there is none before it" if saved_step(back) >= self.state.good_step else ""
            return f"a new start continues from {back}{no_older}"
        if aside is None:
            return "there is no checkpoint to continue from"
        name = checkpoint_name(self.state.step)
        return (
            f"there is no checkpoint: rename {aside.name} to {name} to continue from it, or move it away to start anew"
        )

    def _remedy(self) -> str:
        # a segment that finds its tolerance passed gives NaN (docs/recomputation.md)
        inverse = self.config.recompute.strategy == "inverse"
        return ", or take recompute.strategy replay, which divides by no beta" if inverse else ""

    @property
    def _step_size(self) -> int:
        """Sequences of the step to come, or that is under way."""
        return self.plan.sizes.at(self.state.samples)

    def _work(self, batches: list[Batch]) -> GlobalWork:
        """What the global batch holds; padding, ends of documents and their lengths differ by rank."""
        length, data = self.plan.seq_length, self.config.data
        if data.sample_format == "packed" and not (data.eod_mask_loss or data.reset_attention_mask):
            positions = self._step_size * length
            return GlobalWork(positions, positions * length)
        return global_work(batches, self.context.device)

    def _log(self, window: LoggingWindow) -> dict[str, Any]:
        seconds, positions = time.perf_counter() - window.started, self.plan.seq_length * window.samples
        flops = flops_per_token(self.config.model, window.context / positions) * positions
        values = {
            "tokens": self.state.tokens,
            "loss": self.state.unlogged_loss / self.state.unlogged_steps,
            "grad_norm": self.state.grad_norm,
            "lr": self.state.lr,
            "step_time_s": seconds / window.steps,
            "tokens_per_s": window.tokens / seconds,
            "tflops_per_device": flops / seconds / self.context.world_size / 1e12,
            "peak_memory_bytes": largest_peak_memory_bytes(self.context.device),
        }
        if self.plan.sizes.has_ramp:
            values["samples"], values["global_batch_size"] = self.state.samples, window.step_size
        if self.config.recompute.strategy == "inverse":
            values["num_extra_checkpoints"] = self.engine.num_extra_checkpoints
        if self.config.faults.on_bad_step == "skip":
            values["skipped_steps"] = self.state.skipped
        self.metrics.write(self.state.step, values)
        return values

    def _validates(self, step: int) -> bool:
        training = self.config.training
        interval = training.eval_interval and step % training.eval_interval == 0
        return self.inputs.datasets.valid is not None and bool(interval or step == training.train_steps)

    def _validate(self, to_the_end: bool = False) -> bool:
        """Mean loss over all tokens of the same samples every time. Returns whether no signal cut it short.

        Args:
            to_the_end: take no notice of signals.
        """
        dataset, steps = self.inputs.datasets.valid, self.config.training.eval_steps
        if self._evaluate("validation", dataset, steps, to_the_end) is None:
            return False
        self.state = replace(self.state, validation_due=False)
        return True

    def _test(self) -> None:
        """The loss of the final weights on the test data, to the end whatever signals come. All is saved by then."""
        self._evaluate("test", self.inputs.datasets.test, self.inputs.test_steps)

    def _evaluate(self, what: str, dataset: Any, steps: int, to_the_end: bool = True) -> dict[str, Any] | None:
        """Mean loss over all tokens of the first `steps` global batches of `dataset`, into the metrics and the log.

        Args:
            what: name of the metric.
            to_the_end: take no notice of signals.

        An error, other than that of a lost rank, is a warning: it must not end the training.

        Returns:
            The metrics, empty after an error; None if a signal cut it short.
        """
        totals: list[tuple[float, float]] = []
        failed = False
        vote = Vote(self._is_warned, lambda: failed)
        waiting = self._batches(dataset, 0, steps)
        for number in range(1, steps + 1):
            self.context.heartbeat.report(f"step {self.state.step}, batch {number} of its {what}")
            losses: list[dict[str, torch.Tensor]] = []
            failed = True
            with self._beside(f"the {what} of step {self.state.step}"):
                losses, failed = self.engine.evaluation_losses(next(waiting)), False
            # the others wait for this call whatever has failed here
            totals.append(loss_totals(losses, self.context.device, vote))
            warned, failed = vote.answers
            cut = warned and not to_the_end
            if cut or failed:
                return None if cut else {}
        count = sum(count for _, count in totals)
        if not count:
            self.progress.line(f"warning: the {what} of step {self.state.step} has no token whose loss counts")
            return {}
        loss = sum(total for total, _ in totals) / count
        # e^700 is the largest power a float holds
        perplexity = math.exp(min(loss, 700.0))
        values = {"tokens": self.state.tokens, f"{what}_loss": loss, f"{what}_perplexity": perplexity}
        self.losses[f"{what}_loss"] = loss
        self.metrics.write(self.state.step, values)
        entropy = f" | unigram entropy {self.inputs.entropy:.4f}" if what == "validation" else ""
        self.progress.line(
            f"step {self.state.step} | {what} loss {loss:.4f} | {what} perplexity {perplexity:.2f}{entropy}"
        )
        return values

    @contextmanager
    def _beside(self, what: str) -> Iterator[None]:
        """For work beside the training: an error becomes a warning, unless it is that of a lost rank."""
        try:
            yield
        except Exception as error:
            if is_communication(error) or self.config.training.eval_only:
                raise
            at = "" if self.context.is_main else f" (rank {self.context.rank})"
            print(f"warning{at}: {what} failed and is left out: {describe(error)}", file=sys.stderr, flush=True)

    def _saves(self, step: int) -> bool:
        interval = self.config.checkpoint.save_interval
        return bool(interval and step % interval == 0)

    def _batches(
        self, dataset: Any, first_sample: int, steps: int, sizes: BatchSizes | None = None
    ) -> Iterator[list[Batch]]:
        plan = self.plan
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

    def draw(self) -> None:
        """loss.png, from what metrics.jsonl holds."""
        folder = Path(self.config.logging.output_dir)
        if self.context.is_main and (folder / "metrics.jsonl").exists():
            title, entropy = f"{self.config.model.variant}, {folder.name}", self.inputs.entropy
            with self._beside("loss.png"):
                plot_loss(folder / "metrics.jsonl", folder / "loss.png", title=title, unigram_entropy=entropy)

    def _finish(self) -> None:
        """The picture, and a look at what the model writes."""
        section = self.config.logging
        self.draw()
        if section.sample_prompt is not None and section.sample_tokens:
            prompt, seed = section.sample_prompt, self.config.training.seed
            with self._beside("the sampled continuation"):
                text = continue_text(self.engine, self.inputs.tokenizer, prompt, section.sample_tokens, seed=seed)
                self.progress.line(f"--- a sampled continuation ---\n{prompt}{text}\n---")
        self.progress.line(f"done: {section.output_dir} holds metrics.jsonl, config.yaml, loss.png and tensorboard/")
        self.progress.line(f"checkpoint: {checkpoint_dir(self.config) / checkpoint_name(self.state.step)}")

    def _take_leave(self) -> None:
        received = self.interruption.received
        self.progress.line(
            f"stopped by {received.name if received else 'a signal to another rank'} after step {self.state.step}; the "
            f"same command goes on from {checkpoint_dir(self.config) / checkpoint_name(self.state.step)}"
        )


@dataclass(frozen=True)
class TrainResult:
    """What `run_training` returns, the same on every rank.

    Attributes:
        complete: whether all steps are done; False after a signal, whose state is saved.
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


def run_training(config: Config, *, interruption: Interruption | None = None) -> TrainResult:
    """Run a configuration on the ranks that the launcher started, or alone in this process.

    Joins the process groups, watches over the other ranks and handles signals while it runs, and gives all of them
    back: groups that the caller has set up stay. After a lost rank, or a defect on this rank of several, the groups
    stay as well, because leaving them may wait for ranks that do not come: end the process then.

    Args:
        interruption: the signal handlers of the caller. By default this function takes SIGTERM, SIGUSR1 and SIGINT
            itself from the first step to its end, where it is called in the main thread.

    Raises:
        ConfigError, DataError: the input cannot be used; nothing has been written.
        CheckpointError: the saved state does not fit, or the last one cannot be written.
        PeerLostError: another rank died or stands still.
        BadStepError: a loss is not finite or a spike; the state before it is saved.
    """
    owns_groups = not dist.is_initialized()
    with (
        deterministic_algorithms(config.training.deterministic),
        nullcontext(interruption) if interruption else Interruption(from_start=False) as signals,
    ):
        try:
            context = initialize_parallel(config)
            limit = config.parallel.distributed_timeout_minutes
            with context.heartbeat, naming_lost_peers(context.heartbeat, limit):
                result = _train_on_this_rank(config, context, signals)
        except Exception as error:
            agreed = isinstance(error, CrnetError) and not isinstance(error, PeerLostError)
            if owns_groups and (agreed or not dist.is_initialized() or dist.get_world_size() == 1):
                shutdown_parallel()
            raise
        if owns_groups:
            shutdown_parallel()
        return result


def _train_on_this_rank(config: Config, context: ParallelContext, interruption: Interruption) -> TrainResult:
    if config.training.eval_only:
        return Trainer(config, context, interruption, RunFolders()).evaluate_only()
    with hold_run_folders(config, context.is_main) as folders:
        return _train_in(folders, config, context, interruption)


def _train_in(folders: RunFolders, config: Config, context: ParallelContext, interruption: Interruption) -> TrainResult:
    trainer = Trainer(config, context, interruption, folders)
    if not trainer.is_complete:
        return trainer.run()
    trainer.draw()
    Progress(0, 0, context.is_main).line(
        f"{trainer.inputs.checkpoint} has all {config.training.train_steps} steps already: nothing to do; "
        f"raise training.train_steps to go on, or remove {checkpoint_dir(config)} to start again"
    )
    return TrainResult(True, trainer.inputs.step, trainer.inputs.checkpoint)
