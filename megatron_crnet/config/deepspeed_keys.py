"""The keys of the `deepspeed` section that are allowed, and their types; in which layout: `config/deepspeed.py`.

DeepSpeed silently ignores unknown keys and misreads many combinations, so only keys that work here are allowed. A key
that a user may expect is refused with a reason.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MultipleOf
from pydantic import AfterValidator, BeforeValidator

from megatron_crnet.config.field_types import (
    Count,
    FilePath,
    Name,
    PositiveCount,
    Reason,
    Rule,
    checked,
    nearest,
    shown,
)
from megatron_crnet.utils.errors import require

OWNED_BY_OTHER_SECTIONS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "optimizer.clip_grad",
    "optimizer": "the optimizer section",
    "scheduler": "optimizer.lr_decay_style",
    "bf16": "training.dtype",
    "fp16": "training.dtype",
    "bfloat16": "training.dtype",
    "tensorboard": "logging.output_dir",
    "wandb": "logging.wandb_project",
    "csv_monitor": "logging.output_dir",
    "tensor_parallel": "parallel.tensor_model_parallel_size",
    "pipeline": "parallel.pipeline_model_parallel_size",
    "steps_per_print": "logging.log_interval",
    "communication_data_type": "training.dtype",
    "amp": "training.dtype",
    "data_types": "training.dtype",
    "torch_autocast": "training.dtype",
    "checkpoint": "the checkpoint section",
    "gradient_predivide_factor": "the engine, which averages gradients once,",
    "prescale_gradients": "the engine, which averages gradients once,",
    "managed_gradient_accumulation": "the engine",
}


def _integer(lower: int, upper: int, *notes: Any) -> Any:
    """The type of integers in a range; 5e8, as DeepSpeed's documentation writes them, is one."""

    def as_integer(value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return Annotated[int, BeforeValidator(as_integer), Ge(lower), Le(upper), *notes]


def _only(wanted: bool | None, reason: str) -> Any:
    """The type of a key that takes only DeepSpeed's default (None: must not be set), with the reason."""

    def check(value: Any) -> Any:
        if value is not wanted:
            raise ValueError
        return value

    return Annotated[Any, AfterValidator(check), Reason(reason)]


ELEMENTS, BUCKET = _integer(0, 2**63 - 1), _integer(1, 2**40)
QUANTIZED = (
    "it rounds what ranks exchange to a few bits, in groups of consecutive ranks, which are tensor-parallel ranks "
    "here: leave it out"
)
OFFLOAD: dict[str, Any] = {
    "device": Literal["none", "cpu", "nvme"],
    "nvme_path": FilePath,
    "buffer_count": Count,
    "pin_memory": bool,
}

DEEPSPEED_KEYS: dict[str, Any] = {
    "activation_checkpointing": {
        "partition_activations": bool,
        "cpu_checkpointing": bool,
        "contiguous_memory_optimization": bool,
        "number_checkpoints": Count,
        "synchronize_checkpoint_boundary": bool,
        "profile": bool,
    },
    "aio": {
        "block_size": PositiveCount,
        "queue_depth": PositiveCount,
        "intra_op_parallelism": PositiveCount,
        "single_submit": bool,
        "overlap_events": bool,
    },
    "comms_logger": {
        "enabled": bool,
        "prof_all": bool,
        "prof_ops": Annotated[list[Name], Rule("a list of names of operations")],
        "verbose": bool,
        "debug": bool,
    },
    "dump_state": bool,
    "flops_profiler": {
        "enabled": _only(
            False,
            "it measures passes that DeepSpeed starts, which the schedule here does instead: leave it out, and see the "
            "metrics' MFU and crnet estimate",
        ),
    },
    "memory_breakdown": bool,
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "wall_clock_breakdown": bool,
    "zero_allow_untested_optimizer": _only(True, "the engine brings AdamW, tested or not: leave it out"),
    "zero_force_ds_cpu_optimizer": _only(False, "the engine brings PyTorch's AdamW: leave it out"),
    "zero_optimization": {
        "stage": Annotated[int, Ge(0), Le(3), Rule("one of ZeRO's stages 0, 1, 2 and 3")],
        "contiguous_gradients": bool,
        "reduce_scatter": bool,
        "reduce_bucket_size": BUCKET,
        "use_multi_rank_bucket_allreduce": bool,
        "allgather_partitions": bool,
        "allgather_bucket_size": _integer(
            2,
            2**40,
            MultipleOf(2),
            Rule(f"an even number from 2 to {2**40}, because DeepSpeed aligns its buffers to two elements"),
        ),
        "overlap_comm": bool,
        "offload_param": {**OFFLOAD, "buffer_size": ELEMENTS, "max_in_cpu": ELEMENTS},
        "offload_optimizer": {
            **OFFLOAD,
            "pipeline_read": bool,
            "pipeline_write": bool,
            "fast_init": bool,
            "ratio": _integer(1, 1, Reason("only all of the optimizer's state moves here: leave it out")),
            "super_offload": _only(
                False, "it brings an optimizer of its own, whose gradients the engine does not know: leave it out"
            ),
        },
        "sub_group_size": BUCKET,
        "stage3_prefetch_bucket_size": ELEMENTS,
        "stage3_param_persistence_threshold": ELEMENTS,
        "stage3_model_persistence_threshold": ELEMENTS,
        "stage3_max_live_parameters": ELEMENTS,
        "stage3_max_reuse_distance": ELEMENTS,
        "stage3_module_granularity_threshold": _integer(
            0, 0, Reason("with it DeepSpeed does not gather weights that the passes here use: leave it out")
        ),
        "stage3_use_all_reduce_for_fetch_params": bool,
        "stage3_allgather_sequential": bool,
        "stage3_gather_16bit_weights_on_model_save": bool,
        "zero_hpz_partition_size": PositiveCount,
        "ignore_unused_parameters": bool,
        "memory_efficient_linear": bool,
        "override_module_apply": bool,
        "log_trace_cache_warnings": bool,
        "enable_sanity_checks": bool,
        "cpu_offload": _only(None, "DeepSpeed has renamed it: use offload_optimizer: {device: cpu}"),
        "cpu_offload_param": _only(None, "DeepSpeed has renamed it: use offload_param: {device: cpu}"),
        "cpu_offload_use_pin_memory": _only(None, "DeepSpeed has renamed it: use offload_optimizer.pin_memory"),
        "stage3_gather_fp16_weights_on_model_save": _only(None, "DeepSpeed has renamed it: leave it out"),
        "zenflow": _only(
            None, "it brings an optimizer of its own, which steps at other times than the engine: leave it out"
        ),
        "compute_grad_norm": _only(True, "the engine clips by the norm: leave it out"),
        "round_robin_gradients": _only(
            False,
            "DeepSpeed looks up a parameter's fp32 weights and gradient in the order before that reordering: "
            "leave it out",
        ),
        "legacy_stage1": _only(False, "DeepSpeed has removed that stage 1: leave it out"),
        **dict.fromkeys(
            ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
            _only(False, QUANTIZED),
        ),
    },
}
"""The type of each key, nested as the keys are. A type with a `Reason` takes nothing but DeepSpeed's default."""


def allowed(name: str, types: dict[str, Any], values: Any) -> dict[str, Any]:
    """The values of a mapping, checked key by key.

    Raises:
        ConfigError: a key that is not allowed, or a value that is not of its type.
    """
    require(isinstance(values, dict), f"{name} is {shown(values)}, but must be a mapping: write its keys below it")
    found: dict[str, Any] = {}
    for written, value in values.items():
        # DeepSpeed also takes the keys of stage 3 without their prefix
        key = f"stage3_{written}" if f"stage3_{written}" in types else written
        require(key not in found, f"{name}.{written} and {name}.{key} are both set, but mean the same: remove one")
        require(key in types, f"unknown key {name}.{key}: {nearest(key, types)}")
        if isinstance(types[key], dict):
            found[key] = allowed(f"{name}.{key}", types[key], value)
        else:
            found[key] = checked(f"{name}.{key}", types[key], value, "correct it, or leave it out")
    return found


def given(value: Any) -> Any:
    """A value without the keys that are null or "auto", of which the other sections or DeepSpeed's defaults decide."""
    if value == "auto":
        return None
    if not isinstance(value, dict) or not value:
        return value
    kept = {key: inner for key, outer in value.items() if (inner := given(outer)) is not None}
    return kept or None


def checked_deepspeed(section: Any) -> dict[str, Any]:
    """The `deepspeed` section with every value as its type has it.

    Raises:
        ConfigError: keys that other sections own, keys that are not allowed, or values that are not of their type.
    """
    values = given(section)
    if values is None and section != "auto":
        return {}
    owned = [key for key in values if key in OWNED_BY_OTHER_SECTIONS] if isinstance(values, dict) else []
    owners = " and ".join(dict.fromkeys(OWNED_BY_OTHER_SECTIONS[key] for key in owned))
    require(
        not owned,
        f"{', '.join(f'deepspeed.{key}' for key in owned)} {'is' if len(owned) == 1 else 'are'} set, but {owners} "
        f"{'decides' if len(owned) == 1 else 'decide'} this: remove {'it' if len(owned) == 1 else 'them'}",
    )
    return allowed("deepspeed", DEEPSPEED_KEYS, values)
