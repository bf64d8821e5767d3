"""Warnings and notes on what a resumed run does not share with the run that it continues.

Another model or tokenizer, with which the weights mean nothing, is refused in `checkpoint` and `fingerprint`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_crnet.config.loading import resolved
from megatron_crnet.config.positions import METHODS
from megatron_crnet.config.schema import Config
from megatron_crnet.data.fingerprint import TrainedOn
from megatron_crnet.model.compiled import compiles
from megatron_crnet.utils.versions import NOT_INSTALLED, library_versions

Values = Mapping[str, Any]
PYTORCH = "PyTorch's operations"
COMPILERS = ("torch", "triton")

ORDER = (
    "data.sample_format",
    "data.split",
    "training.seq_length",
    "training.seed",
    "training.train_steps",
    "training.global_batch_size",
    "training.rampup_batch_size",
)
"""Fields beside the data that decide the order of samples: Megatron-Core shuffles the epochs of a run together, so the
number of samples of the whole run counts."""
DOCUMENTS = ("data.reset_attention_mask", "data.reset_position_ids", "data.eod_mask_loss")
"""Fields that decide what a sample teaches."""
MOMENTS_CONVERTED = {
    "adamw": "its moments go on in fp32 from their values in 8 bits",
    "adamw8bit": "its moments are rounded to 8 bits from here",
}
OLDER: dict[str, dict[str, Any]] = {
    "data": {name.partition(".")[2]: False for name in DOCUMENTS},
    "optimizer": {"name": "adamw"},
    "parallel": {"moe_token_dispatcher_type": "allgather"},
}
"""By section: values of configurations of versions without these fields."""
SIZES = tuple(f"parallel.{ranks}_model_parallel_size" for ranks in ("tensor", "pipeline", "virtual_pipeline", "expert"))
"""Of the layout: see `changed_layout`."""
OF_SIZES = ("parallel.sequence_parallel", "parallel.num_layers_in_")
"""What other sizes change as well."""
OF_NO_RESULT = (
    # contents count, not paths: TrainedOn
    *(f"data.{split}data_path" for split in ("", "train_", "valid_", "test_")),
    "data.split",
    "data.tokenizer_",
    "data.cache_path",
    "data.num_workers",
    "checkpoint.",
    "logging.",
    "model.max_position_embeddings",
    "training.eval_interval",
    "training.eval_only",
    "training.eval_steps",
    "training.test_steps",
    *SIZES,
    "parallel.overlap_tp_communication",
    "parallel.distributed_timeout_minutes",
)
"""Prefixes of fields that no weight depends on."""


def differences(config: Config, checkpoint: Path, saved: Values, state: Values, trained_on: TrainedOn) -> list[str]:
    """Warnings, then notes, for the start of a run that continues `checkpoint`.

    Args:
        saved: the checkpoint's resolved configuration.
        state: its state.json.
        trained_on: tokenizer and data of this run.
    """
    if not state.get("samples"):  # an import, or a run that was stopped before its first step
        return []
    before, now = TrainedOn.from_state(state), resolved(config)
    changes = list(_changes(saved, now))
    implied = OF_SIZES if any(key in SIZES for key, _, _ in changes) else ()
    lines = [] if before is None else [f"warning: {line}" for line in before.other_data(trained_on)]
    settings = []
    for key, old, new in changes:
        differs = f"warning: {key} differs from the checkpoint's ({new} instead of {old})"
        if key in DOCUMENTS:
            lines.append(
                f"{differs}: from here samples are read in another way, and losses cannot be compared with those before"
            )
        elif key in ORDER:
            if key != "data.split" or now["data"]["data_path"]:
                lines.append(
                    f"{differs}, so the training data may come in another order from here: some samples may be seen "
                    "again and some not"
                )
        elif key == "optimizer.name" and {old, new} <= MOMENTS_CONVERTED.keys():  # else there are none yet
            lines.append(f"{differs}: {MOMENTS_CONVERTED[new]}")
        elif not key.startswith((*OF_NO_RESULT, *implied)):
            settings.append(f"{key} {old} -> {new}")
    if before is None:
        lines.append(
            f"note: checkpoint {checkpoint} does not say what it was trained on, as those of earlier versions do not: "
            "tokenizer and data are taken for the same"
        )
    if settings:
        lines.append(f"note: changed since the checkpoint: {', '.join(settings)}")
    inverts = config.recompute.traits.inverts and METHODS[config.model.variant].is_chained
    if inverts and "norm_ratios" not in state:
        lines.append(
            "note: recompute.strategy inverse plans its segments anew, by the first batch from here, because the "
            "checkpoint does not hold norms of outputs: gradients may differ from those of a run that was not stopped, "
            "within its tolerance"
        )
    if libraries := list(_other_libraries(state)):
        lines.append(f"note: other libraries than the checkpoint's, which may round otherwise: {', '.join(libraries)}")
    return lines


def changed_layout(config: Config, why: str) -> str:
    """The warning on other devices or another layout than the checkpoint's, of which `why` names the differences."""
    model = config.model
    dropout = ", and dropout draws other numbers" if model.hidden_dropout or model.attention_dropout else ""
    if config.optimizer.name == "adamw8bit":
        dropout += ", and moments are rounded to 8 bits again, in other blocks"
    return (
        f"warning: resumed on other devices or in another layout than the checkpoint's ({why}): losses are the same to "
        f"rounding, not to the bit{dropout}"
    )


def _other_libraries(state: Values) -> Iterator[str]:
    before, now = state.get("versions"), library_versions()
    for library, version in before.items() if isinstance(before, dict) else ():
        if library in now and now[library] != version:
            yield f"{library} {version} -> {now[library]}"


def _changes(saved: Values, now: Values) -> Iterator[tuple[str, Any, Any]]:
    """`section.field` with both values; a field that the older configuration does not have is not compared."""
    for section, fields in now.items():
        before = OLDER.get(section, {}) | (saved.get(section) or {})
        names = {**before, **fields} if section == "deepspeed" else [name for name in fields if name in before]
        for name in names:
            if before.get(name) != fields.get(name):
                yield f"{section}.{name}", before.get(name), fields.get(name)


def glue_in_use(config: Config, device: torch.device) -> str:
    """What computes the layers' glue: kernels that torch.compile makes, by their libraries, or PyTorch's operations."""
    runs = compiles(device, config.training.cross_layer_fusion)
    return _kernels(library_versions(COMPILERS)) if runs else PYTORCH


def changed_glue(config: Config, device: torch.device, saved: Values, versions: Mapping[str, str]) -> str | None:
    """A warning where the layers' glue rounds otherwise than before the checkpoint, else None, as on CPUs.

    Args:
        saved: its resolved configuration; without `cross_layer_fusion` where it is older than this choice.
        versions: of its libraries.
    """
    fused = saved.get("training", {}).get("cross_layer_fusion", False) and versions.get("triton") != NOT_INSTALLED
    before, now = _kernels(versions) if fused else PYTORCH, glue_in_use(config, device)
    if device.type != "cuda" or before == now:
        return None
    return (
        f"the layers' glue was computed by {before} until the checkpoint and is by {now} from here, which round "
        "differently: the losses are the same to rounding, not to the bit"
    )


def _kernels(versions: Mapping[str, str]) -> str:
    named = (f"{library} {versions.get(library, '(unknown version)')}" for library in COMPILERS)
    return f"compiled kernels ({', '.join(named)})"
