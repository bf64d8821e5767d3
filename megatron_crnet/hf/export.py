"""Checkpoints as folders that Hugging Face transformers opens, and back."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.serialization import StateDictSplit, split_state_dict_into_shards_factory
from torch import Tensor

from megatron_crnet.checkpoint.weight_files import (
    INDEX,
    ExportWeights,
    WeightSource,
    canonical_shapes,
)
from megatron_crnet.config.loading import load_config
from megatron_crnet.config.schema import Config
from megatron_crnet.data.fingerprint import TrainedOn, digest_of_tokenizer
from megatron_crnet.data.tokenizer import Tokenizer, TokenizerKind, check_vocabulary, load_tokenizer
from megatron_crnet.hf.export_config import CRNET_TYPE, LENGTH, hugging_face_fields, read_export_config
from megatron_crnet.hf.export_tokenizer import tokenizer_of, write_tokenizer
from megatron_crnet.hf.merged import weights_of
from megatron_crnet.hf.plain import FORMATS, plain_fields
from megatron_crnet.hf.plain_weights import FromPlain, ToPlain
from megatron_crnet.hf.starting_checkpoint import save_tensors, write_starting_checkpoint
from megatron_crnet.utils.errors import DataError, require
from megatron_crnet.utils.files import atomic_folder, exists, read_json_object

CODE = ("configuration_crnet.py", "linear_crnet.py", "layer_crnet.py", "modeling_crnet.py")
AUTO_MAP = {
    "AutoConfig": "configuration_crnet.CRNetConfig",
    "AutoModel": "modeling_crnet.CRNetModel",
    "AutoModelForCausalLM": "modeling_crnet.CRNetForCausalLM",
    "AutoModelForSequenceClassification": "modeling_crnet.CRNetForSequenceClassification",
}
EXPORTED_BY = {"exported_by": "megatron_crnet"}
"""In config.json of a plain export, by which --overwrite knows it."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Dtype = Literal["fp32", "bf16"]
PATTERN = "model{suffix}.safetensors"


def torch_dtype(name: Dtype) -> torch.dtype:
    """PyTorch's precision of that name."""
    require(name in DTYPES, f"dtype is {name!r}, but must be {' or '.join(DTYPES)}: choose one of them")
    return DTYPES[name]


def cast(dtype: Dtype, name: str, tensor: Tensor) -> Tensor:
    """A weight in the precision of an export: beta is fp32 in all."""
    return tensor.float() if name.endswith(".beta") else tensor.to(torch_dtype(dtype))


def saved_config(checkpoint: Path) -> Config:
    """The configuration that a checkpoint was written with.

    Raises:
        DataError: it cannot be read.
    """
    if not (checkpoint / "config.yaml").is_file():
        raise DataError(f"checkpoint {checkpoint} has no config.yaml: use another one")
    return load_config(checkpoint / "config.yaml")


def with_tokenizer(config: Config, path: str) -> Config:
    """The configuration with another tokenizer: a folder holds Hugging Face's, a file is SentencePiece's."""
    kind: TokenizerKind = "huggingface" if Path(path).is_dir() else "sentencepiece"
    return replace(config, data=replace(config.data, tokenizer_type=kind, tokenizer_model=path))


def to_hf(
    checkpoint: Path,
    out: Path,
    *,
    dtype: Dtype = "fp32",
    tokenizer: str | None = None,
    shard_size: int | str = "5GB",
    plain: bool = False,
    overwrite: bool = False,
) -> int:
    """Write OUT from a whole checkpoint. Host memory holds about one file of weights at a time.

    Args:
        dtype: of all weights but beta, which stays fp32.
        tokenizer: path of the tokenizer; None takes the one that the checkpoint's configuration names.
        shard_size: largest file of weights; more than that are cut, with an index.
        plain: for Transformers' own class of the architecture, which holds full-rank weights (`plain.py`).
        overwrite: replace an older export.

    Returns:
        The number of parameters.

    Raises:
        ConfigError: no such `shard_size`, or `plain` of a model that Transformers has no class for.
        DataError: OUT exists or cannot be written, the tokenizer is missing, or a weight is missing, unknown, of
            another shape, not finite or zero all over. Nothing is left behind.
    """
    require(
        shard_size > 0 if isinstance(shard_size, int) else bool(re.fullmatch(r"[1-9]\d{0,8}[KMGT]B", str(shard_size))),
        f"--shard-size is {shard_size}, but must be a number above 0 with KB, MB, GB or TB: write 5GB, say",
    )
    config = saved_config(checkpoint)
    if tokenizer is not None:
        config = with_tokenizer(config, tokenizer)
    config, source = weights_of(checkpoint, config)
    if exists(out) and overwrite and not _is_export(out):
        raise DataError(f"{out} is not an export, so --overwrite does not replace it: choose another folder")
    about = _plain_about(config) if plain else _crnet_about(config)
    if plain:
        source = ToPlain(source, FORMATS[config.model.architecture], canonical_shapes(config.model))
    with atomic_folder(out, overwrite) as folder:
        for name in () if plain else CODE:
            shutil.copyfile(Path(__file__).with_name(name), folder / name)
        _write_descriptions(config, about, folder, dtype)
        _write_weights(source, folder, dtype, shard_size)
    return sum(torch.Size(shape).numel() for shape in source.shapes.values())


def _is_export(folder: Path) -> bool:
    about = read_json_object(folder / "config.json")
    return about.get("model_type") == CRNET_TYPE or EXPORTED_BY.items() <= about.items()


def _write_weights(source: WeightSource, folder: Path, dtype: Dtype, shard_size: int | str) -> None:
    plan = _plan_files(source, dtype, shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_tensors(source.checked(names, partial(cast, dtype)), folder / file)
        shutil.copymode(folder / "config.json", folder / file)  # safetensors lets only the owner read
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _plan_files(source: WeightSource, dtype: Dtype, shard_size: int | str) -> StateDictSplit:
    """Which weight goes into which file."""
    empty = {name: cast(dtype, name, torch.empty(shape, device="meta")) for name, shape in source.shapes.items()}
    return split_state_dict_into_shards_factory(
        empty, get_storage_size=lambda tensor: tensor.nbytes, filename_pattern=PATTERN, max_shard_size=shard_size
    )


def _crnet_about(config: Config) -> dict[str, Any]:
    about = {"architectures": ["CRNetForCausalLM"], "auto_map": AUTO_MAP, "model_type": CRNET_TYPE}
    return {**about, **hugging_face_fields(config)}


def _plain_about(config: Config) -> dict[str, Any]:
    fields = plain_fields(config)
    return {"architectures": [FORMATS[config.model.architecture].model_class], **EXPORTED_BY, **fields}


def _write_descriptions(config: Config, about: dict[str, Any], folder: Path, dtype: Dtype) -> None:
    """config.json, generation_config.json and the tokenizer."""
    kind, path = config.data.tokenizer_type, _tokenizer_path(config)
    try:
        tokenizer = write_tokenizer(kind, path, folder, hugging_face_fields(config)[LENGTH])
    except DataError as error:
        raise DataError(f"{error}, or give another with --tokenizer") from error
    check_vocabulary(tokenizer, config.model.vocab_size, ITS_OWN)
    ends = {"eos_token_id": tokenizer.eod, "pad_token_id": tokenizer.pad}
    about = {**about, "bos_token_id": None, **ends, "dtype": str(torch_dtype(dtype)).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")


ITS_OWN = "give the tokenizer that the model was trained with (--tokenizer)"


def _tokenizer_path(config: Config) -> str:
    if config.data.tokenizer_model is None:
        raise DataError("the checkpoint's configuration names no tokenizer: give one with --tokenizer")
    return config.data.tokenizer_model


def named_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that a configuration names.

    Raises:
        DataError: there is none, or it cannot be read.
        ConfigError: it has more tokens than the model.
    """
    tokenizer = load_tokenizer(config.data.tokenizer_type, _tokenizer_path(config))
    check_vocabulary(tokenizer, config.model.vocab_size, ITS_OWN)
    return tokenizer


def open_export(folder: Path) -> tuple[Config, WeightSource]:
    """The configuration of an export or of a model of Transformers' own classes, and its weights.

    Raises:
        DataError, ConfigError: see `read_export_config` and `ExportWeights`.
    """
    config, kind = read_export_config(folder), read_json_object(folder / "config.json")["model_type"]
    if kind in FORMATS:
        return config, FromPlain(folder, FORMATS[kind], canonical_shapes(config.model))
    return config, ExportWeights(folder)


def from_hf(export: Path, folder: Path, tokenizer: str | None = None) -> Path:
    """Write the weights of an export, `plain` or not, as a checkpoint of step 0, with moments of zero. Returns it.

    A run with the same model section and `checkpoint.dir FOLDER` continues from it under any layout.

    Args:
        tokenizer: path of the tokenizer for the run to come; None takes the export's own. The checkpoint names it
            as the one that the weights were trained with, so that another one is noticed as in a run's own checkpoints.

    Raises:
        DataError: FOLDER holds states of a run or cannot be written, the export's weights are not whole (`to_hf`), or
            there is no tokenizer. Nothing is left behind.
        ConfigError: the export's sizes contradict each other, or another process writes FOLDER.
    """
    config, source = open_export(export)
    source.check(canonical_shapes(config.model))
    config = with_tokenizer(config, tokenizer or tokenizer_of(export.resolve())[1])
    trained_on = TrainedOn(digest_of_tokenizer(named_tokenizer(config)))
    portions = source.portions(partial(cast, "fp32"))
    return write_starting_checkpoint(folder, config, trained_on, "a Hugging Face export", portions)
