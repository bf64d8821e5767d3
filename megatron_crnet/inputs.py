"""What a run reads: tokenizer, data, checkpoint. All of it is examined on every rank before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_crnet.agreement import CHECKPOINT, examine_together
from megatron_crnet.batch import BatchPlan
from megatron_crnet.checkpoint import check_resumable, checkpoint_dir, newest_complete, tidy
from megatron_crnet.checkpoint_folder import checkpoints, saved_step
from megatron_crnet.config import Config
from megatron_crnet.data import Datasets, build_datasets, data_fingerprint
from megatron_crnet.errors import ConfigError
from megatron_crnet.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megatron_crnet.unigram import unigram_entropy


@dataclass(frozen=True)
class Inputs:
    """What was found, the same on every rank.

    Attributes:
        checkpoint: the newest whole one; None for a new run.
        saved: its resolved configuration.
        damaged: a line on each newer checkpoint that is damaged.
        entropy: unigram entropy in nats of the very tokens whose loss a validation reports; None without one.
    """

    tokenizer: Tokenizer
    checkpoint: Path | None
    saved: dict[str, Any]
    damaged: list[str]
    datasets: Datasets
    entropy: float | None

    @property
    def step(self) -> int:
        """Steps that the checkpoint has done."""
        return saved_step(self.checkpoint) if self.checkpoint else 0


def examine_inputs(config: Config, plan: BatchPlan) -> Inputs:
    """Open everything that `config` names; a collective call.

    Raises:
        ConfigError, DataError: something is missing, damaged, or differs between ranks.
        CheckpointError: the checkpoint's configuration cannot be read.
    """
    tidy(checkpoint_dir(config))
    tokenizer = examine_together(partial(_examine, config))
    checkpoint, damaged = newest_complete(checkpoint_dir(config))
    saved = examine_together(partial(_examine_checkpoint, config, checkpoint))
    datasets = _datasets(config, tokenizer, plan)
    return Inputs(tokenizer, checkpoint, saved, damaged, datasets, _entropy(config, datasets, plan))


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


def _examine_checkpoint(config: Config, checkpoint: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    return check_resumable(config, checkpoint) if checkpoint else {}, {}


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


def _entropy(config: Config, datasets: Datasets, plan: BatchPlan) -> float | None:
    if datasets.valid is None:
        return None
    count = config.training.eval_steps * plan.global_batch_size
    return unigram_entropy((datasets.valid[i] for i in range(count)), config.model.vocab_size)
