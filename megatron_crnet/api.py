"""The functions of `from megatron_crnet import ...`: training, planning, conversion and evaluation.

Heavy libraries are imported by the call that needs them. Errors are those of `megatron_crnet.utils.errors`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_crnet.config.schema import Config
from megatron_crnet.utils.errors import require, require_positive

if TYPE_CHECKING:
    import torch

    from megatron_crnet.data.preprocess import PreprocessResult
    from megatron_crnet.hf.evaluate import Evaluation
    from megatron_crnet.hf.generate import OpenModel
    from megatron_crnet.planning.estimate import Estimate
    from megatron_crnet.planning.search import Plan
    from megatron_crnet.planning.simulation import StepProfile
    from megatron_crnet.training.trainer import TrainResult

PathLike = str | Path
Dtype = Literal["fp32", "bf16"]


def train(config: Config) -> TrainResult:
    """Train a configuration, or resume its run, on the ranks that a launcher started or in this process alone.

    Process groups, the watchdog's threads and the handlers of SIGTERM, SIGUSR1 and SIGINT exist during the call;
    process groups of the caller are used and kept.

    Returns:
        Whether all steps are done, the last step, the newest checkpoint, and the last losses in nats per token; the
        same on every rank.

    Raises:
        ConfigError, DataError: the input cannot be used; nothing has been written.
        CheckpointError: the saved state does not fit, or the last one cannot be written.
        BadStepError: a loss is not finite or a spike; the state before it is saved.
        PeerLostError: another rank died or stalled.
    """
    from megatron_crnet.distributed.launcher import keep_launch_order

    keep_launch_order(config.parallel.tensor_model_parallel_size)
    _prepare()
    from megatron_crnet.training.trainer import run_training

    return run_training(config)


def train_tokenizer(
    paths: PathLike | Sequence[PathLike], out_prefix: PathLike, vocab_size: int = 32000, *, overwrite: bool = False
) -> Path:
    """Train a SentencePiece tokenizer on files and folders of text. Returns the path of OUT_PREFIX.model.

    Raises:
        ConfigError: `vocab_size` is too small for the alphabet, or too large.
        DataError: there is no text, or the output exists.
    """
    from megatron_crnet.data.corpus import iter_documents
    from megatron_crnet.data.train_tokenizer import train_sentencepiece

    return train_sentencepiece(iter_documents(_listed(paths)), out_prefix, vocab_size, overwrite=overwrite)


def preprocess(
    paths: PathLike | Sequence[PathLike],
    out_prefix: PathLike,
    tokenizer_model: PathLike,
    *,
    workers: int = 0,
    overwrite: bool = False,
) -> PreprocessResult:
    """Tokenize files and folders of text into OUT_PREFIX.bin and OUT_PREFIX.idx.

    Args:
        tokenizer_model: a SentencePiece .model file, or the folder of a Hugging Face tokenizer.
        workers: processes that tokenize; 0 does it in this process.

    Raises:
        ConfigError: `workers` is negative or too large.
        DataError: input or tokenizer is missing or damaged, or the output exists.
    """
    from megatron_crnet.data.preprocess import preprocess as write

    kind: Literal["sentencepiece", "huggingface"] = "huggingface" if Path(tokenizer_model).is_dir() else "sentencepiece"
    return write(_listed(paths), out_prefix, kind, str(tokenizer_model), workers=workers, overwrite=overwrite)


def _listed(paths: PathLike | Sequence[PathLike]) -> Sequence[PathLike]:
    return [paths] if isinstance(paths, PathLike) else paths


def estimate(config: Config, world_size: int, gpu: str = "h100", *, gpus_per_node: int = 8) -> Estimate:
    """Memory in bytes, operations, traffic in bytes and time in seconds of a step on `world_size` ranks, by formula.

    Args:
        gpu: a100-80g, h100, h200, or the path of a YAML file with the fields of `planning.machines.Machine`.

    Raises:
        ConfigError: the batch or the layout does not fit `world_size` ranks, or the GPU is unknown.
    """
    require_positive("estimate", world_size=world_size, gpus_per_node=gpus_per_node)
    _prepare()
    from megatron_crnet.planning.estimate import estimate as by_formula
    from megatron_crnet.planning.machines import find_machine

    return by_formula(config, world_size, find_machine(gpu), gpus_per_node)


def plan(config: Config, gpus: int, gpu: str = "h100", *, gpus_per_node: int = 8) -> list[Plan]:
    """The layouts of `config` that fit on `gpus` GPUs, the fastest first; empty where none does.

    Each has its `config`, ready for `train`, and its `estimate`. Arguments and errors as for `estimate`.
    """
    require_positive("plan", gpus=gpus, gpus_per_node=gpus_per_node)
    _prepare()
    from megatron_crnet.planning.machines import find_machine
    from megatron_crnet.planning.search import search

    found = search(config, gpus, find_machine(gpu), gpus_per_node)
    if found.stopped:
        raise KeyboardInterrupt
    return found.ranked()


def simulate(config: Config, world_size: int, rank: int = 0) -> StepProfile:
    """Count a step of one rank of a world of up to 4096, by the real code on fake tensors.

    Raises:
        ConfigError: the world does not fit the configuration, or values that do not exist would decide something.
    """
    _prepare()
    from megatron_crnet.planning.simulation import simulate as count

    return count(config, world_size, rank)


def load_pretrained(
    path: PathLike, *, dtype: Dtype = "fp32", device: torch.device | None = None, tokenizer: PathLike | None = None
) -> OpenModel:
    """Open an export, a checkpoint, or the folder of a run (its newest complete checkpoint).

    Args:
        device: None takes the GPU if there is one.
        tokenizer: path of another tokenizer than the model's own.

    Returns:
        `model`, a `CRNetForCausalLM`: `model(input_ids)` gives `.logits` [b, s, vocabulary] for tokens [b, s] (int64);
        `tokenizer`; `config`.

    Raises:
        DataError: there is no model, or its weights are incomplete.
        ConfigError: its sizes contradict each other.
    """
    from megatron_crnet.hf.generate import open_model

    opened = open_model(Path(path), dtype=dtype, device=device, tokenizer=_text(tokenizer))
    _warn(opened.notes)
    return opened


def evaluate(
    model: OpenModel,
    *,
    data: PathLike | None = None,
    text: PathLike | None = None,
    validation_of: Config | None = None,
    seq_length: int | None = None,
    batch_size: int = 8,
    padded: bool = False,
    reset_attention_mask: bool = False,
    max_tokens: int | None = None,
    allow_longer: bool = False,
) -> Evaluation:
    """Loss in nats per token and perplexity of a model over one of three sources.

    Args:
        model: from `load_pretrained`.
        data: prefix of .bin and .idx files.
        text: a file or folder of text.
        validation_of: the samples that a run of this configuration validates on. In process groups of the caller all
            ranks must make this call, because they build an index of samples together.
        seq_length: tokens in a row; None takes the model's `max_position_embeddings`.
        batch_size: rows in a forward pass.
        padded: a row per document, cut; else documents are joined and cut, and every token counts once.
        reset_attention_mask: attention stays within documents, for models trained so.
        max_tokens: stop after that many.
        allow_longer: rows may be longer than the model was trained for.

    Raises:
        ConfigError: not one source, rows longer than the model was trained for, or a batch larger than the memory.
        DataError: the source is missing or damaged, was made with another tokenizer, or holds no token to measure.
    """
    from megatron_crnet.hf.evaluate import evaluate_rows, rows_to_evaluate

    given = [source for source in (data, text, validation_of) if source is not None]
    require(len(given) == 1, f"{len(given)} sources are given, but one is measured: give data, text or validation_of")
    numbers = {"seq_length": seq_length, "batch_size": batch_size, "max_tokens": max_tokens}
    require_positive("evaluation", **{name: value for name, value in numbers.items() if value is not None})
    if validation_of is not None:
        require(seq_length is None, "seq_length is the run's own with validation_of: leave it out")
        require(not padded, "padded is the run's own with validation_of: leave it out")
    require(
        not (reset_attention_mask and (padded or validation_of is not None)),
        "reset_attention_mask is for packed rows of data or text: leave it out",
    )
    work = rows_to_evaluate(
        model,
        data=data,
        text=text,
        validation_of=validation_of,
        seq_length=seq_length,
        allow_longer=allow_longer,
        padded=padded,
        reset_attention_mask=reset_attention_mask,
        max_tokens=max_tokens,
    )
    return evaluate_rows(model.model, work, batch_size)


def to_hf(
    run: PathLike,
    out: PathLike,
    *,
    dtype: Dtype = "fp32",
    tokenizer: PathLike | None = None,
    shard_size: int | str = "5GB",
    plain: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint as a folder that Hugging Face transformers opens. Returns it.

    Args:
        run: a checkpoint, a folder of checkpoints or the folder of a run, whose newest complete one is taken.
        dtype: of all weights but beta, which stays fp32.
        tokenizer: path of the tokenizer; None takes the one that the checkpoint's configuration names.
        shard_size: largest file of weights.
        plain: of a full-rank model, for Transformers' own class, such as LlamaForCausalLM.
        overwrite: replace an older export.

    Raises:
        ConfigError: `plain` of a model that Transformers has no class for.
        DataError: there is no complete checkpoint or no tokenizer, or `out` exists or cannot be written.
    """
    from megatron_crnet.checkpoint.contents import find_checkpoint
    from megatron_crnet.hf.export import to_hf as write

    checkpoint, notes = find_checkpoint(Path(run))
    _warn(notes)
    write(
        checkpoint,
        Path(out),
        dtype=dtype,
        tokenizer=_text(tokenizer),
        shard_size=shard_size,
        plain=plain,
        overwrite=overwrite,
    )
    return Path(out)


def from_hf(export: PathLike, folder: PathLike, tokenizer: PathLike | None = None) -> Path:
    """Write an export, `plain` or not, as a checkpoint of step 0. Returns it.

    A run with `checkpoint.dir` FOLDER continues from it.

    Args:
        tokenizer: path of the tokenizer for the run to come; None takes the export's own.

    Raises:
        DataError: `folder` holds states of a run or cannot be written, or the export is incomplete.
        ConfigError: the export's sizes contradict each other, or another process writes `folder`.
    """
    from megatron_crnet.hf.export import from_hf as read
    from megatron_crnet.hf.export_tokenizer import note_on_added_tokens

    if tokenizer is None and (note := note_on_added_tokens(Path(export))):
        _warn([note])
    return read(Path(export), Path(folder), _text(tokenizer))


def _prepare() -> None:
    from megatron_crnet.distributed import cpu_backend

    cpu_backend.install()


def _text(path: PathLike | None) -> str | None:
    return None if path is None else str(path)


def _warn(notes: Sequence[str]) -> None:
    for note in notes:
        warnings.warn(note, stacklevel=3)
