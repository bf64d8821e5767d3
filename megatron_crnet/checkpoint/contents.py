"""Validates the contents of a checkpoint; its checksums are right for whatever was written."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, create_model
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_crnet.checkpoint.directory import FINAL, checkpoints_at, damage, newest_without, saved_step, unreadable
from megatron_crnet.checkpoint.train_state import TrainingState
from megatron_crnet.checkpoint.weight_files import Shapes, canonical_weights_of, headers_of
from megatron_crnet.config.phases import saved_model
from megatron_crnet.config.positions import position_table
from megatron_crnet.config.schema import ModelConfig, OptimizerConfig
from megatron_crnet.engine.galore import kept_shapes
from megatron_crnet.engine.state_kinds import MASTER
from megatron_crnet.utils.errors import DataError

NEEDED = ("step", "tokens", "samples")
"""Counters without which a run cannot go on; earlier versions did not write all of the others."""


def find_checkpoint(path: Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint of a path (`checkpoints_at`), with a line on each newer one that is damaged.

    Raises:
        CheckpointError: as `damage`.
        DataError: there is none.
    """
    newest, skipped = newest_without(lambda found: damage(found) or wrong_contents(found), checkpoints_at(path))
    if newest is None:
        raise DataError(f"{path} has no whole checkpoint ({skipped[0]}): use another")
    return newest, skipped


def wrong_contents(checkpoint: Path) -> str | None:
    """Why the state, configuration or tensors of a checkpoint with right checksums are invalid; None if they are not.

    Reads the headers of all files of tensors, not their values.

    Raises:
        CheckpointError: as `damage`.
    """
    try:
        return _wrong_state(checkpoint) or _wrong_tensors(checkpoint)
    except Exception as error:  # a library may raise anything on a file of another format
        return unreadable(checkpoint, error)


def _wrong_state(checkpoint: Path) -> str | None:
    try:
        state: Any = _saved_state().model_validate_json((checkpoint / "state.json").read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        return f"has a state.json that is wrong in {where} ({first['msg']})"
    if FINAL.fullmatch(checkpoint.name) and state.step != saved_step(checkpoint):
        return f"has step {state.step} in its state.json and another in its name"
    changes = list(state.rank_changes)
    if changes != sorted(set(changes)) or not all(0 < change <= state.step for change in changes):
        return f"has changed ranks after the steps {changes}, which do not ascend to its step {state.step}"
    if not state.skipped_in_a_row <= state.skipped <= state.step:
        return f"has skipped {state.skipped} of {state.step} steps, {state.skipped_in_a_row} in a row"
    return None


@cache
def _saved_state() -> type[BaseModel]:
    """state.json: the counters, none of them negative, and what `Checkpointer` needs beside them."""
    hints = get_type_hints(TrainingState)
    counters: dict[str, Any] = {
        field.name: (
            NonNegativeInt if hints[field.name] is int else hints[field.name],
            ... if field.name in NEEDED else field.default,
        )
        for field in fields(TrainingState)
    }
    rest: dict[str, Any] = {
        "adam_steps": (NonNegativeInt, ...),
        "layout": (dict[str, Any], ...),
        "versions": (dict[str, str], {}),
    }
    return create_model("SavedState", __config__=ConfigDict(strict=True, allow_inf_nan=False), **counters, **rest)


def _wrong_tensors(checkpoint: Path) -> str | None:
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        return "has a config.yaml without a model section"
    if not all(isinstance(section, dict) for section in config.values()):
        return "has a config.yaml whose sections are not all mappings"
    saved = headers_of(checkpoint).state_dict_metadata
    model = saved_model(config, json.loads((checkpoint / "state.json").read_text()))
    known = {field.name for field in fields(OptimizerConfig)} & set(config.get("optimizer", {}))
    optimizer = OptimizerConfig(**{key: config["optimizer"][key] for key in known})
    for full, shape in saved_shapes(model, optimizer).items():
        found = saved.get(full)
        if not isinstance(found, TensorStorageMetadata):
            return f"lacks the tensor {full} of its model"
        if tuple(found.size) != shape:
            return f"has {full} in the shape {tuple(found.size)} instead of {shape}"
        if found.properties.dtype != torch.float32:
            return f"has {full} in {found.properties.dtype} instead of torch.float32"
        if sum(chunk.sizes.numel() for chunk in found.chunks) != found.size.numel():
            return f"has {full} in parts that do not make a whole"
    return None


def saved_shapes(model: ModelConfig, optimizer: OptimizerConfig) -> Shapes:
    """Shapes of the tensors of a checkpoint, all in fp32, by kind and canonical name."""
    table, found = position_table(model), Shapes()
    for name, weight in canonical_weights_of(model).items():
        whole = tuple(weight.shape)
        kept = kept_shapes(name, whole, optimizer, table) if weight.requires_grad else {MASTER: whole}
        found |= {f"{kind}.{name}": shape for kind, shape in kept.items()}
    return found


def bytes_of(shapes: Shapes) -> int:
    """Bytes of the tensors of a checkpoint (`saved_shapes`)."""
    return 4 * sum(map(math.prod, shapes.values()))
