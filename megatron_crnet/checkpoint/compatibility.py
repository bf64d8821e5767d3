"""Whether a run can go on from a checkpoint: the same model, the same form of moments, the same phase."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from megatron_crnet.config.architectures import ARCHITECTURES
from megatron_crnet.config.loading import resolved
from megatron_crnet.config.model_fields import computing_fields
from megatron_crnet.config.phases import is_warm_start
from megatron_crnet.config.positions import METHODS, NEEDS_TEXT, position_table
from megatron_crnet.config.rank_section import rank_after
from megatron_crnet.config.schema import Config, ModelConfig
from megatron_crnet.utils.errors import CheckpointError, ConfigError, describe, require

OLDER = {
    **{"architecture": "llama", "tie_word_embeddings": False, "rope_scaling_factor": None},
    **{"only_lr_act": False, "relora_scale": ModelConfig.relora_scale},
    **{"num_experts": None, "full_rank_experts": False},
    **{"moe_router_topk": ModelConfig.moe_router_topk, "moe_router_pre_softmax": False},
}
"""Values in checkpoints of versions without these fields of the model."""


def saved_state(checkpoint: Path) -> dict[str, Any]:
    """The state.json of a checkpoint: counters, library versions, what it was trained on.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return dict(json.loads((checkpoint / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read ({describe(error)}): use another one") from error


def check_resumable(
    config: Config,
    checkpoint: Path,
    remedy: str = "use the saved values or another logging.output_dir",
    step: int | None = None,
    *,
    with_moments: bool = True,
) -> dict[str, Any]:
    """Raise for a checkpoint of another model, or with moments of another form. Returns its resolved configuration.

    Args:
        step: at which the run will be; None: at the checkpoint's.
        with_moments: whether moments are to be read.

    Raises:
        ConfigError: a field that defines the weights or the form of moments differs; names all that do.
        CheckpointError: the checkpoint's configuration cannot be read.
    """
    try:
        saved = yaml.safe_load((checkpoint / "config.yaml").read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} has no readable config.yaml: remove it") from error
    asked = resolved(config)
    wanted, found, at = asked["model"], OLDER | saved["model"], None
    if (saved.get("rank_schedule") or {}).get("ranks") or config.rank_schedule.ranks:
        state = saved_state(checkpoint)
        at, changes = state["step"], state.get("rank_changes", ())
        found["rank"] = rank_after(found.get("rank"), saved.get("rank_schedule"), at, changes)
        wanted["rank"] = rank_after(wanted["rank"], config.rank_schedule, at if step is None else step, changes)
    for name, known in (("variant", METHODS), ("architecture", ARCHITECTURES)):
        require(
            found[name] in known,
            f"checkpoint {checkpoint} was written with model.{name} {found[name]}, which this version does not have: "
            f"{remedy}",
        )
    defined, asked_for = _defining(found), _defining(wanted)
    names = [n for n in asked_for if defined.get(n) != asked_for[n] and found.get(n) != wanted[n]]
    if names:
        difference = ", ".join(f"model.{name} {found.get(name)} instead of {wanted[name]}" for name in names)
        if "variant" in names and found["variant"] == "full_rank" and wanted["variant"] in NEEDS_TEXT:
            remedy = f"{remedy}, or make one of it by crnet init --model.variant {wanted['variant']}"
        if names == ["rank"] and at in config.rank_schedule.steps:
            remedy = f"{remedy}, or let ranks change after step {at}"
        raise ConfigError(f"checkpoint {checkpoint} was written with {difference}: {remedy}")
    if METHODS[config.model.variant].has_frozen:
        _check_phase(saved, asked, checkpoint, step, remedy)
    before, now = _form_of_moments(saved.get("optimizer") or {}), _form_of_moments(asked["optimizer"])
    if with_moments and before != now and saved_state(checkpoint)["adam_steps"]:
        otherwise = "leave out checkpoint.load_optimizer"
        if step is None:
            otherwise = "begin a new run with its weights alone by checkpoint.load"
        raise ConfigError(
            f"checkpoint {checkpoint} holds moments of {before}, from which none of {now} follow: {remedy}, or "
            f"{otherwise}"
        )
    return dict(saved)


def _defining(model: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved fields that say what weights there are and compute, with a rank for each map; a model whose ranks
    are refused today keeps them as they were written."""
    found = computing_fields(model)
    with suppress(ConfigError):
        found["rank"] = position_table(ModelConfig(**model)).ranks
    return found


def _check_phase(
    saved: Mapping[str, Any], asked: Mapping[str, Any], checkpoint: Path, step: int | None, remedy: str
) -> None:
    """Raise where a checkpoint is of the other phase of ReLoRA, or the run's phases were cut elsewhere."""
    at = saved_state(checkpoint)["step"]
    before, now = ((values.get("relora") or {}).get("warm_start_steps", 0) for values in (saved, asked))
    holds, needs = is_warm_start(saved, at), is_warm_start(asked, at if step is None else step)
    kinds = {True: "the full-rank weights of a warm start", False: "frozen weights with factors"}
    require(
        holds == needs,
        f"checkpoint {checkpoint} holds {kinds[holds]}, but relora.warm_start_steps {now} needs {kinds[needs]} there: "
        f"{remedy if holds or step is None else f'use relora.warm_start_steps 0, or {remedy}'}",
    )
    require(
        holds or step is not None or before == now or asked["training"]["eval_only"],
        f"checkpoint {checkpoint} is of a run whose warm start had {before} steps, but relora.warm_start_steps is "
        f"{now}, from which the schedule and restarts after it are counted: {remedy}",
    )


def _form_of_moments(section: Mapping[str, Any]) -> str:
    """What their shapes depend on, in a resolved `optimizer` section; older ones have no name."""
    names = {"galore": ("galore_rank", "proj_type")}.get(section.get("name", ""))
    if names is None:
        return "full rank"
    return ", ".join(f"optimizer.{name} {section.get(name)}" for name in names)
