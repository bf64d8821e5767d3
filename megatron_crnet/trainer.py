"""The training loop: batches in, optimizer steps, validation, checkpoints, metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_crnet.agreement import CHECKPOINT, examine_together
from megatron_crnet.arithmetic import flops_per_token
from megatron_crnet.batch import BatchPlan, plan_batches
from megatron_crnet.checkpoint import (
    Checkpointer,
    TrainingState,
    check_resumable,
    checkpoint_dir,
    newest_complete,
    tidy,
)
from megatron_crnet.checkpoint_folder import REJECTED, checkpoint_name, checkpoints, saved_step
from megatron_crnet.config import Config
from megatron_crnet.data import Datasets, build_datasets, data_fingerprint
from megatron_crnet.data_loading import global_batches
from megatron_crnet.deepspeed_settings import check_deepspeed_keys
from megatron_crnet.engine import StepResult, TrainEngine
from megatron_crnet.errors import CheckpointError, ConfigError, NonFiniteLossError
from megatron_crnet.gpt import build_model_chunks
from megatron_crnet.liveness import naming_lost_peers
from megatron_crnet.metrics import MetricsWriter, Progress, check_sinks, peak_memory_bytes
from megatron_crnet.parallel import ParallelContext, initialize_parallel, seed_random_states
from megatron_crnet.plot import plot_loss
from megatron_crnet.sampling import continue_text
from megatron_crnet.schedule import Batch
from megatron_crnet.settings import save_config
from megatron_crnet.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megatron_crnet.unigram import unigram_entropy


@dataclass
class LoggingWindow:
    """Means over the steps since the last metric line; `started` moves on by what is no training."""

    started: float
    steps: int = 0
    tokens: int = 0
    loss: float = 0.0

    def add(self, result: StepResult) -> None:
        """Count one step."""
        self.steps += 1
        self.tokens += result.tokens
        self.loss += result.loss


class Trainer:
    """One run of one configuration on this rank.

    Everything that can be wrong with the input is found in here, before the run's folder is touched.
    """

    def __init__(self, config: Config, context: ParallelContext) -> None:
        self.config, self.context = config, context
        self.plan: BatchPlan = plan_batches(config, context.world_size)
        check_deepspeed_keys(config)
        check_sinks(config)
        tidy(checkpoint_dir(config))
        self.tokenizer = examine_together(partial(_examine, config))
        self.checkpoint, self.damaged = newest_complete(checkpoint_dir(config))
        self.saved = examine_together(partial(_examine_checkpoint, config, self.checkpoint))
        self.datasets = _datasets(config, self.tokenizer, self.plan)
        self.entropy = self._validation_entropy()

    def _validation_entropy(self) -> float | None:
        """Unigram entropy of the very tokens whose loss a validation reports."""
        if self.datasets.valid is None:
            return None
        count = self.config.training.eval_steps * self.plan.global_batch_size
        return unigram_entropy((self.datasets.valid[i] for i in range(count)), self.config.model.vocab_size)

    @property
    def is_complete(self) -> bool:
        """Whether an earlier run has done all steps already."""
        return self.checkpoint is not None and saved_step(self.checkpoint) >= self.config.training.train_steps

    def run(self) -> None:
        """Train from the newest checkpoint, or from scratch, to the last step."""
        self.engine = TrainEngine(self.config, build_model_chunks(self.config), self.context)
        self.checkpointer = Checkpointer(self.config, self.engine)
        # another layout than the checkpoint's has no random states of its own to continue from
        seed_random_states(self.config.training.seed + (saved_step(self.checkpoint) if self.checkpoint else 0))
        self.state = self.checkpointer.load(self.checkpoint) if self.checkpoint else TrainingState()
        self.engine.restore_schedule(self.state.step)
        self._prepare_folder()
        self.progress = Progress(self.config.training.train_steps, self.state.step, self.context.is_main)
        with MetricsWriter(self.config, self.context.is_main, self.state.step) as self.metrics:
            self._announce()
            with self.context.heartbeat.watching(60 * self.config.parallel.distributed_timeout_minutes):
                self._train()
        self.progress.close()
        self._finish()

    def _prepare_folder(self) -> None:
        if self.context.is_main:
            folder = Path(self.config.logging.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_config(self.config, folder / "config.yaml")

    def _announce(self) -> None:
        for line in self.damaged:
            self.progress.line(f"warning: {line}")
        if self.checkpoint is not None:
            self.progress.line(f"continuing from {self.checkpoint}, step {self.state.step}")
            if self.state.samples:
                self._warn_of_another_order()
        if self.entropy is not None:
            self.progress.line(
                f"unigram entropy of the validation tokens: {self.entropy:.4f} nats "
                f"(perplexity {math.exp(self.entropy):.1f}): a loss below it shows that context is used"
            )

    def _warn_of_another_order(self) -> None:
        """Megatron-Core shuffles the epochs of a run together, so their number decides the order of all samples."""
        saved, training = (self.saved or {}).get("training", {}), self.config.training
        wanted = {name: getattr(training, name) for name in ("train_steps", "global_batch_size", "seed", "seq_length")}
        changed = [name for name, value in wanted.items() if saved.get(name) != value]
        if changed:
            self.progress.line(
                f"warning: training.{changed[0]} differs from the checkpoint's, so the training data may come in "
                "another order from here: some samples may be seen again and some not"
            )

    def _train(self) -> None:
        training, window = self.config.training, LoggingWindow(time.perf_counter())
        heartbeat = self.context.heartbeat
        for batches in self._batches(self.datasets.train, self.state.samples, training.train_steps - self.state.step):
            step = self.state.step + 1
            heartbeat.report(f"step {step}")
            result = self._step(batches)
            samples = self.state.samples + self.plan.global_batch_size
            self.state = TrainingState(step, self.state.tokens + result.tokens, samples)
            window.add(result)
            logged = step % self.config.logging.log_interval == 0 or step in (1, training.train_steps)
            self.progress.advance(step, self._log(result, window) if logged else None)
            if logged:
                window = LoggingWindow(time.perf_counter())
            paused = time.perf_counter()
            if self._validates(step):
                self._validate()
            if self._saves(step):
                heartbeat.report(f"the checkpoint of step {step}")
                self._save(last=step == training.train_steps)
            window.started += time.perf_counter() - paused

    def _save(self, last: bool) -> None:
        try:
            self.checkpointer.wait()
        except CheckpointError as error:
            self.progress.line(f"warning: {error}; training goes on")
        seconds = self.checkpointer.save(self.state)
        if last:
            self.checkpointer.wait()
        self.metrics.write(self.state.step, {"checkpoint_wait_s": seconds})

    def _step(self, batches: list[Batch]) -> StepResult:
        tokens = self._trained_tokens(batches)
        loss = self.engine.forward_backward(batches, tokens)
        if not math.isfinite(loss):
            self._stop(f"the loss is {loss}", self.engine.current_lr, self.engine.last_grad_norm)
        grad_norm, lr = self.engine.update()
        if not math.isfinite(grad_norm):
            self._stop(f"the loss is {loss:.4f} and the gradient norm {grad_norm}", lr, grad_norm)
        return StepResult(loss, grad_norm, lr, tokens)

    def _stop(self, what: str, lr: float, grad_norm: float | None) -> None:
        """Stop on every rank alike. The bad step has changed no weight; what led to it may have.

        The state before the step is saved without being continued from, and `latest` goes back to a checkpoint
        whose next step was good.
        """
        self.checkpointer.save(self.state)
        good = self.checkpointer.reject(self.state.step)
        norm = "none yet" if grad_norm is None else f"{grad_norm:.4g}"
        raise NonFiniteLossError(
            f"{what} at step {self.state.step + 1} (learning rate {lr:.3e}, last gradient norm {norm}), but must be "
            f"finite: lower optimizer.lr or look at the data of this step{self._remedy()}; a new start continues from "
            f"{good or 'the beginning, as there is no earlier checkpoint'}; the state just before this step is kept "
            f"beside it as {REJECTED}{checkpoint_name(self.state.step)}"
        )

    def _remedy(self) -> str:
        # a segment that finds its tolerance passed gives NaN (docs/recompute.md)
        inverse = self.config.recompute.strategy == "inverse"
        return ", or take recompute.strategy replay, which divides by no beta" if inverse else ""

    def _trained_tokens(self, batches: list[Batch]) -> int:
        """Positions of the global batch whose loss counts; the padding of padded rows differs by rank."""
        if self.config.data.sample_format == "packed":
            return self.plan.tokens_per_step
        count = torch.stack([batch["loss_mask"].sum() for batch in batches]).sum().double()
        dist.all_reduce(count)
        replicas = self.context.world_size // self.context.dp_size
        return round(float(count) / replicas)

    def _log(self, result: StepResult, window: LoggingWindow) -> dict[str, Any]:
        seconds = time.perf_counter() - window.started
        flops = flops_per_token(self.config.model, self.plan.seq_length) * self.plan.tokens_per_step * window.steps
        values = {
            "tokens": self.state.tokens,
            "loss": window.loss / window.steps,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "step_time_s": seconds / window.steps,
            "tokens_per_s": window.tokens / seconds,
            "tflops_per_device": flops / seconds / self.context.world_size / 1e12,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if self.config.recompute.strategy == "inverse":
            values["added_anchors"] = self.engine.added_anchors
        self.metrics.write(self.state.step, values)
        return values

    def _validates(self, step: int) -> bool:
        training = self.config.training
        interval = training.eval_interval and step % training.eval_interval == 0
        return self.datasets.valid is not None and bool(interval or step == training.train_steps)

    def _validate(self) -> None:
        """Mean loss over all tokens of the same samples every time."""
        totals: list[tuple[float, float]] = []
        for batches in self._batches(self.datasets.valid, 0, self.config.training.eval_steps):
            self.context.heartbeat.report(f"step {self.state.step}, batch {len(totals) + 1} of its validation")
            totals.append(self.engine.evaluate(batches))
        loss = sum(total for total, _ in totals) / sum(count for _, count in totals)
        # e^700 is the largest power a float holds
        perplexity = math.exp(min(loss, 700.0))
        values = {"tokens": self.state.tokens, "validation_loss": loss, "validation_perplexity": perplexity}
        self.metrics.write(self.state.step, values)
        self.progress.line(
            f"step {self.state.step} | validation loss {loss:.4f} | validation perplexity {perplexity:.2f} | "
            f"unigram entropy {self.entropy:.4f}"
        )

    def _saves(self, step: int) -> bool:
        interval = self.config.checkpoint.save_interval
        return step == self.config.training.train_steps or bool(interval and step % interval == 0)

    def _batches(self, dataset: Any, first_sample: int, steps: int) -> Iterator[list[Batch]]:
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
        ):
            yield [{k: v.to(self.context.device, non_blocking=True) for k, v in batch.items()} for batch in batches]

    def draw(self) -> None:
        """loss.png, from what metrics.jsonl holds."""
        folder = Path(self.config.logging.output_dir)
        if self.context.is_main and (folder / "metrics.jsonl").exists():
            title = f"{self.config.model.variant}, {folder.name}"
            plot_loss(folder / "metrics.jsonl", folder / "loss.png", title=title, unigram_entropy=self.entropy)

    def _finish(self) -> None:
        """The picture, and a look at what the model writes."""
        section = self.config.logging
        self.draw()
        if section.sample_prompt is not None and section.sample_tokens:
            seed = self.config.training.seed
            text = continue_text(self.engine, self.tokenizer, section.sample_prompt, section.sample_tokens, seed=seed)
            self.progress.line(f"--- a sampled continuation ---\n{section.sample_prompt}{text}\n---")
        self.progress.line(f"done: {section.output_dir} holds metrics.jsonl, config.yaml, loss.png and tensorboard/")
        self.progress.line(f"checkpoint: {checkpoint_dir(self.config) / checkpoint_name(self.state.step)}")


def train(config: Config) -> None:
    """Run a configuration on the ranks that the launcher started.

    Raises:
        ConfigError, DataError: the input cannot be used; nothing has been written.
        CheckpointError: the saved state does not fit.
        PeerLostError: another rank died or stands still.
        NonFiniteLossError: the loss left the finite numbers; the last good state is saved.
    """
    context = initialize_parallel(config)
    limit = config.parallel.distributed_timeout_minutes
    with context.heartbeat, naming_lost_peers(context.heartbeat, limit):
        _train_on_this_rank(config, context)


def _train_on_this_rank(config: Config, context: ParallelContext) -> None:
    trainer = Trainer(config, context)
    if trainer.is_complete:
        trainer.draw()
        Progress(0, 0, context.is_main).line(
            f"{trainer.checkpoint} has all {config.training.train_steps} steps already: nothing to do; "
            f"raise training.train_steps to go on, or remove {checkpoint_dir(config)} to start again"
        )
        return
    trainer.run()


def _examine(config: Config) -> tuple[Tokenizer, dict[str, str]]:
    """Open what this rank can see of the input, and say what must be the same on all ranks."""
    tokenizer = _tokenizer(config)
    check_vocabulary(tokenizer, config.model.vocab_size)
    if not (config.data.data_path or config.data.train_data_path):
        raise ConfigError("data.data_path is empty, but names the .bin/.idx files to train on: give their prefix")
    names = [path.name for path in checkpoints(checkpoint_dir(config))]
    return tokenizer, {
        "tokenizer": repr(tokenizer.unique_identifiers),
        "contents of the data": data_fingerprint(config),
        CHECKPOINT: ", ".join(names) or "(none)",
    }


def _examine_checkpoint(config: Config, checkpoint: Path | None) -> tuple[dict[str, Any] | None, dict[str, str]]:
    return check_resumable(config, checkpoint) if checkpoint else None, {}


def _tokenizer(config: Config) -> Tokenizer:
    if config.data.tokenizer_model is None:
        raise ConfigError("data.tokenizer_model is not set, but names the tokenizer of the data: give its path")
    return load_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)


def _datasets(config: Config, tokenizer: Tokenizer, plan: BatchPlan) -> Datasets:
    training = config.training
    return build_datasets(
        config,
        tokenizer,
        num_train_samples=training.train_steps * plan.global_batch_size,
        num_valid_samples=training.eval_steps * plan.global_batch_size,
    )
