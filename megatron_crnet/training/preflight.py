"""Examines everything that a run reads, on every rank, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_crnet.checkpoint.compatibility import check_resumable, saved_state
from megatron_crnet.checkpoint.directory import checkpoint_dir, checkpoints, saved_step
from megatron_crnet.checkpoint.manager import newest_complete, tidy
from megatron_crnet.checkpoint.run_folder import RunFolders, check_remains, check_space, hold_run_folders
from megatron_crnet.checkpoint.train_state import TrainingState
from megatron_crnet.config.batch import BatchPlan, check_memory, plan_batches
from megatron_crnet.config.model_size import remark_on_unused_rows
from megatron_crnet.config.optimizer_rules import remark_on_unread
from megatron_crnet.config.phases import planned_phases
from megatron_crnet.config.schema import Config
from megatron_crnet.data.datasets import Datasets, build_datasets, cache_root, data_fingerprint
from megatron_crnet.data.fingerprint import TrainedOn, digest_of_tokenizer, remark_on_unnamed
from megatron_crnet.data.indexed import blends_of, check_enough, read_index
from megatron_crnet.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megatron_crnet.data.unigram import entropy_of, label_counts
from megatron_crnet.distributed.consensus import (
    CHECKPOINT,
    examine_together,
    report_together,
    run_on_all_ranks,
    run_on_main,
)
from megatron_crnet.distributed.process_groups import ParallelContext
from megatron_crnet.training.metrics import check_sinks, steps_with
from megatron_crnet.training.resumption import differences
from megatron_crnet.training.shared_reads import Known, read_together, view_of
from megatron_crnet.training.starting_point import StartingPoint, find_starting_point
from megatron_crnet.training.teacher import Teacher, find_teacher
from megatron_crnet.utils.errors import ConfigError, DataError, describe


@dataclass(frozen=True)
class Preflight:
    """Results, the same on every rank but for `context` and `folders`.

    Attributes:
        folders: those of the run, held against other writers.
        trained_on: tokenizer and data of this run.
        checkpoint: the newest whole one of this run; None for a new run.
        start: whose weights a new run starts from; None if they are random.
        teacher: that the run trains beside; None without distillation.
        saved: resolved configuration of `checkpoint`.
        state: state.json of `checkpoint`.
        damaged: a line on each newer checkpoint that is damaged.
        test_steps: global batches of the test after the last step; 0 for none.
        entropy: unigram entropy in nats of the tokens whose loss a validation reports; None without one.
        validation_due, test_due: whether the validation of the checkpoint's step is still to be done, or the last test.
        remarks: warnings and notes for the log.
    """

    config: Config
    context: ParallelContext
    folders: RunFolders
    plan: BatchPlan
    tokenizer: Tokenizer
    trained_on: TrainedOn
    checkpoint: Path | None
    start: StartingPoint | None
    teacher: Teacher | None
    saved: dict[str, Any]
    state: dict[str, Any]
    damaged: list[str]
    datasets: Datasets
    test_steps: int
    entropy: float | None
    validation_due: bool = False
    test_due: bool = False
    remarks: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps that the checkpoint has done."""
        return saved_step(self.checkpoint) if self.checkpoint else 0

    @property
    def is_complete(self) -> bool:
        """Whether an earlier run has done all steps already, their last validation and the test."""
        return self.step >= self.config.training.train_steps and not (self.validation_due or self.test_due)

    @property
    def extends(self) -> bool:
        """Whether steps were added to a run that had done all of its own."""
        if self.checkpoint is None or self.start is not None or self.config.training.eval_only:
            return False
        return self.saved["training"]["train_steps"] == self.step < self.config.training.train_steps

    @property
    def timeout_s(self) -> float:
        """How long collective calls may wait."""
        return 60 * self.config.parallel.distributed_timeout_minutes

    def is_validated(self, step: int) -> bool:
        """Whether there is a validation after `step`."""
        training = self.config.training
        interval = training.eval_interval and step % training.eval_interval == 0
        return self.datasets.valid is not None and bool(interval or step == training.train_steps)


@contextmanager
def run_preflight(config: Config, context: ParallelContext) -> Iterator[Preflight]:
    """Examine everything that `config` names, and hold the folders of the run for the block; a collective call.

    Raises:
        ConfigError, DataError: something is missing, damaged, in use, or differs between ranks.
        CheckpointError: the checkpoint's configuration cannot be read.
    """
    with RunFolders() if config.training.eval_only else hold_run_folders(config, context.is_main) as folders:
        yield _examine_all(config, context, folders)


def _examine_all(config: Config, context: ParallelContext, folders: RunFolders) -> Preflight:
    plan = plan_batches(config, context.world_size)
    run_on_all_ranks(partial(_examine_machine, config, context))
    if not config.training.eval_only:
        tidy(checkpoint_dir(config))
    tokenizer = examine_together(partial(_examine, config))
    prefixes = _prefixes(config)
    known = read_together(prefixes, report_together(partial(view_of, prefixes)), cache_root(config, prefixes[0]))
    trained_on = examine_together(partial(_examine_data, config, tokenizer))
    checkpoint, damaged = newest_complete(checkpoints(checkpoint_dir(config)))
    saved, state = run_on_all_ranks(partial(_examine_checkpoint, config, checkpoint, damaged, trained_on))
    loads = config.checkpoint.load is not None and (checkpoint is None or config.training.eval_only)
    start = find_starting_point(config, trained_on) if loads else None
    has_steps = checkpoint is None or saved_step(checkpoint) < config.training.train_steps
    teacher = find_teacher(config, trained_on) if has_steps else None
    test_steps, untested = run_on_all_ranks(partial(_planned_test, config))
    datasets = _datasets(config, tokenizer, plan, TrainingState.from_values(state), test_steps, known)
    known.keep()
    entropy = _entropy(config, datasets, config.training.eval_steps * plan.global_batch_size, context.device)
    found = Preflight(
        config=config,
        context=context,
        folders=folders,
        plan=plan,
        tokenizer=tokenizer,
        trained_on=trained_on,
        checkpoint=checkpoint,
        start=start,
        teacher=teacher,
        saved=saved,
        state=state,
        damaged=damaged,
        datasets=datasets,
        test_steps=test_steps,
        entropy=entropy,
    )
    found = replace(found, validation_due=_is_validation_due(found), test_due=_is_test_due(found))
    return replace(found, remarks=_remarks(found, prefixes, untested))


def _remarks(found: Preflight, prefixes: list[str], untested: str | None) -> list[str]:
    """What to know before the first step; a collective call."""
    config, start, teacher = found.config, found.start, found.teacher
    writes = not (found.is_complete or config.training.eval_only)
    space = run_on_main(partial(check_space, config, found.step)) if writes else None
    unread = f"checkpoint.load {config.checkpoint.load} is not read: the run goes on from its own checkpoint"
    notes = [
        remark_on_unused_rows(config.model, found.tokenizer.vocab_size),
        remark_on_unread(config.optimizer),
        remark_on_unnamed(prefixes),
        untested,
        unread if config.checkpoint.load and start is None else None,
    ]
    resumed = found.checkpoint if start is None else None
    return [
        *(f"warning: {line}" for line in (*found.damaged, space, _steep_restarts(config)) if line),
        *(f"note: {line}" for line in notes if line),
        *(start.remarks if start else []),
        *(teacher.remarks if teacher else []),
        *(differences(config, resumed, found.saved, found.state, found.trained_on) if resumed else []),
    ]


def _steep_restarts(config: Config) -> str | None:
    """A warning where ReLoRA's restarts prune moments under a rate that does not drop there."""
    interval, style = config.relora.restart_interval, config.optimizer.lr_decay_style
    if interval is None or style == "cosine_restarts":
        return None
    return (
        f"relora.restart_interval {interval} prunes moments while optimizer.lr_decay_style {style} keeps its rate, "
        "and the first updates after a restart may undo what was learnt: use cosine_restarts"
    )


def _is_validation_due(found: Preflight) -> bool:
    """Whether the checkpoint's step is still to be validated, as rank 0's metrics say; a collective call."""
    due = bool(found.state.get("validation_due")) and _is_missing("validation_loss", found)
    return due and found.is_validated(found.step)


def _is_test_due(found: Preflight) -> bool:
    """Whether the last step is done, but not the test of its weights, as rank 0's metrics say; a collective call."""
    done = found.step == found.config.training.train_steps and found.datasets.test is not None
    return done and _is_missing("test_loss", found)


def _is_missing(metric: str, found: Preflight) -> bool:
    metrics = Path(found.config.logging.output_dir) / "metrics.jsonl"
    return run_on_main(lambda: found.step not in steps_with(metric, metrics))


def _examine_machine(config: Config, context: ParallelContext) -> None:
    for phase in planned_phases(config):
        check_memory(phase.config, context.device)
    if context.is_main:
        check_sinks(config)


def _examine(config: Config) -> tuple[Tokenizer, dict[str, str]]:
    """Open the tokenizer. Returns it and facts that must be equal on all ranks."""
    if config.data.tokenizer_model is None:
        raise ConfigError("data.tokenizer_model is not set, but names the tokenizer of the data: give its path")
    tokenizer = load_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
    check_vocabulary(tokenizer, config.model.vocab_size)
    _check_prompt(config.logging.sample_prompt, tokenizer)
    if not (config.data.data_path or config.data.train_data_path or config.training.eval_only):
        raise ConfigError("data.data_path is empty, but names the .bin/.idx files to train on: give their prefix")
    _prefixes(config)
    facts = {"tokenizer": repr(tokenizer.unique_identifiers)}
    if not config.training.eval_only:  # beside which a run may write the folder
        names = [path.name for path in checkpoints(checkpoint_dir(config))]
        facts[CHECKPOINT] = ", ".join(names) or "(none)"
    return tokenizer, facts


def _examine_data(config: Config, tokenizer: Tokenizer) -> tuple[TrainedOn, dict[str, str]]:
    trained_on = TrainedOn(digest_of_tokenizer(tokenizer), data_fingerprint(config))
    return trained_on, {"contents of the data": repr(trained_on.data)}


def _prefixes(config: Config) -> list[str]:
    """Every prefix that the data section names, once."""
    every = (prefix for blend in blends_of(config.data).values() for prefix in blend.prefixes)
    return list(dict.fromkeys(every))


def _examine_checkpoint(
    config: Config, checkpoint: Path | None, damaged: list[str], trained_on: TrainedOn
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and state.json of the checkpoint; empty without one."""
    if config.training.eval_only:
        _check_evaluation(config, checkpoint)
    elif checkpoint is None:
        check_remains(config, damaged)
    if checkpoint is None:
        return {}, {}
    with_moments = not config.training.eval_only
    saved, state = check_resumable(config, checkpoint, with_moments=with_moments), saved_state(checkpoint)
    if before := TrainedOn.from_state(state):
        before.check_tokenizer(checkpoint, trained_on.tokenizer)
    return saved, state


def _check_prompt(prompt: str | None, tokenizer: Tokenizer) -> None:
    """Encode the prompt of the run's end at its start."""
    try:
        tokenizer.tokenize(prompt or "")
    except Exception as error:  # each library has its own
        raise ConfigError(
            f"logging.sample_prompt is {prompt!r}, which the tokenizer cannot encode ({describe(error)}): give other "
            "text"
        ) from error


def _check_evaluation(config: Config, checkpoint: Path | None) -> None:
    """Refuse training.eval_only without weights or data."""
    training, found = config.training, blends_of(config.data)
    if checkpoint is None and config.checkpoint.load is None:
        raise ConfigError(
            f"training.eval_only needs a checkpoint, but {checkpoint_dir(config)} holds none: set checkpoint.load"
        )
    tested = training.eval_steps if training.test_steps is None else training.test_steps
    if not (("valid" in found and training.eval_steps) or ("test" in found and tested)):
        raise ConfigError(
            "training.eval_only has nothing to measure: set data.valid_data_path or data.test_data_path, and "
            "training.eval_steps above 0"
        )


def _planned_test(config: Config) -> tuple[int, str | None]:
    """Global batches of the test, and a note where the test share of data.split is too small for one."""
    wanted, blend = config.training.test_steps, blends_of(config.data).get("test")
    if wanted is not None or blend is None:  # a test that was asked for without data is refused with the datasets
        return wanted or 0, None
    if config.data.data_path and config.training.eval_steps:
        try:
            for prefix in blend.prefixes:
                check_enough(read_index(prefix), "test", blend.share, config)
        except DataError as error:
            return 0, f"nothing is tested after the last step: {error}"
    return config.training.eval_steps, None


def _datasets(
    config: Config, tokenizer: Tokenizer, plan: BatchPlan, done: TrainingState, test_steps: int, known: Known
) -> Datasets:
    training = config.training
    remaining = max(training.train_steps - done.step, 1)  # 1 for a complete run, which ends later
    return build_datasets(
        config,
        tokenizer,
        # what is done may have been in steps of another size
        num_train_samples=0 if training.eval_only else plan.sizes.after(remaining, done.samples),
        num_valid_samples=training.eval_steps * plan.global_batch_size,
        num_test_samples=test_steps * plan.global_batch_size,
        known_ids=known.ids,
        checked=run_on_all_ranks,
    )


def _entropy(config: Config, datasets: Datasets, count: int, device: torch.device) -> float | None:
    """Of the `count` samples of a validation, each of which is drawn by one rank alone."""
    if datasets.valid is None:
        return None
    share = range(dist.get_rank(), count, dist.get_world_size())
    samples = (datasets.valid[i] for i in share)
    counts = run_on_all_ranks(lambda: label_counts(samples, config.model.vocab_size)).to(device)
    dist.all_reduce(counts)
    return entropy_of(counts) if counts.any() else None
