"""The keys of the `deepspeed` section that are allowed, and their types; in which layout: `config/deepspeed_rules.py`.

DeepSpeed ignores keys that it does not know and misreads many combinations without a word, so that only what is known
to work here is allowed. Reasons stand where a key's absence would make a user wonder.
"""

from __future__ import annotations

import difflib
from functools import cache
from typing import Annotated, Any, Literal, TypedDict, get_type_hints, is_typeddict

from annotated_types import Ge, Le, MultipleOf
from pydantic import AfterValidator, BeforeValidator

from megatron_crnet.config.field_types import Count, FilePath, Name, PositiveCount, Reason, Rule, checked, shown
from megatron_crnet.utils.errors import ConfigError, require

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


def _whole(value: Any) -> Any:
    """5e8, DeepSpeed's own spelling, is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _only(value: bool, wanted: bool) -> bool:
    if value is not wanted:
        raise ValueError(f"must be {shown(wanted)}")
    return value


Elements = Annotated[int, BeforeValidator(_whole), Ge(0), Le(2**63 - 1)]
Bucket = Annotated[int, BeforeValidator(_whole), Ge(1), Le(2**40)]
Off = Annotated[bool, AfterValidator(lambda value: _only(value, False))]
On = Annotated[bool, AfterValidator(lambda value: _only(value, True))]
RENAMED = "DeepSpeed has renamed it: use "
QUANTIZED = (
    "it rounds what ranks exchange to a few bits, in groups of consecutive ranks, which are tensor-parallel ranks "
    "here: leave it out"
)


class Throughput(TypedDict, total=False):
    """DeepSpeed's own clock of throughput."""

    enabled: bool
    synchronized: bool


class Timers(TypedDict, total=False):
    """Clocks."""

    throughput: Throughput


class CommsLogger(TypedDict, total=False):
    """What DeepSpeed's collectives send, logged by it."""

    enabled: bool
    prof_all: bool
    prof_ops: Annotated[list[Name], Rule("a list of names of operations")]
    verbose: bool
    debug: bool


class FlopsProfiler(TypedDict, total=False):
    """Only that it is off."""

    enabled: Annotated[
        Off,
        Reason(
            "it measures passes that DeepSpeed starts, which the schedule here does instead: leave it out, and see the "
            "metrics' MFU and crnet estimate"
        ),
    ]


class Aio(TypedDict, total=False):
    """Asynchronous reads and writes of nvme offload."""

    block_size: PositiveCount
    queue_depth: PositiveCount
    intra_op_parallelism: PositiveCount
    single_submit: bool
    overlap_events: bool


class ActivationCheckpointing(TypedDict, total=False):
    """Where kept activations live (docs/recomputation.md)."""

    partition_activations: bool
    cpu_checkpointing: bool
    contiguous_memory_optimization: bool
    number_checkpoints: Count
    synchronize_checkpoint_boundary: bool
    profile: bool


class Offload(TypedDict, total=False):
    """What moves to the host or its disks."""

    device: Literal["none", "cpu", "nvme"]
    nvme_path: FilePath
    buffer_count: Count
    pin_memory: bool


class OffloadParam(Offload, total=False):
    """Weights on the host."""

    buffer_size: Elements
    max_in_cpu: Elements


class OffloadOptimizer(Offload, total=False):
    """Optimizer state on the host."""

    pipeline_read: bool
    pipeline_write: bool
    fast_init: bool
    ratio: Annotated[
        int, BeforeValidator(_whole), Ge(1), Le(1), Reason("only all of the optimizer's state moves here: leave it out")
    ]
    super_offload: Annotated[
        Off, Reason("it brings an optimizer of its own, whose gradients the engine does not know: leave it out")
    ]


class ZeroOptimization(TypedDict, total=False):
    """ZeRO; the last keys are refused with their reasons, unless they say what DeepSpeed's default says."""

    stage: Annotated[int, Ge(0), Le(3), Rule("one of ZeRO's stages 0, 1, 2 and 3")]
    contiguous_gradients: bool
    reduce_scatter: bool
    reduce_bucket_size: Bucket
    use_multi_rank_bucket_allreduce: bool
    allgather_partitions: bool
    allgather_bucket_size: Annotated[
        int,
        BeforeValidator(_whole),
        Ge(2),
        Le(2**40),
        MultipleOf(2),
        Rule(f"an even number from 2 to {2**40}, because DeepSpeed aligns its buffers to two elements"),
    ]
    overlap_comm: bool
    offload_param: OffloadParam
    offload_optimizer: OffloadOptimizer
    sub_group_size: Bucket
    stage3_prefetch_bucket_size: Elements
    stage3_param_persistence_threshold: Elements
    stage3_model_persistence_threshold: Elements
    stage3_max_live_parameters: Elements
    stage3_max_reuse_distance: Elements
    stage3_module_granularity_threshold: Annotated[
        int,
        Ge(0),
        Le(0),
        Reason("with it DeepSpeed does not gather weights that the passes here use: leave it out"),
    ]
    stage3_use_all_reduce_for_fetch_params: bool
    stage3_allgather_sequential: bool
    stage3_gather_16bit_weights_on_model_save: bool
    zero_hpz_partition_size: PositiveCount
    ignore_unused_parameters: bool
    memory_efficient_linear: bool
    override_module_apply: bool
    log_trace_cache_warnings: bool
    enable_sanity_checks: bool
    cpu_offload: Annotated[None, Reason(RENAMED + "offload_optimizer: {device: cpu}")]
    cpu_offload_param: Annotated[None, Reason(RENAMED + "offload_param: {device: cpu}")]
    cpu_offload_use_pin_memory: Annotated[None, Reason(RENAMED + "offload_optimizer.pin_memory")]
    stage3_gather_fp16_weights_on_model_save: Annotated[None, Reason("DeepSpeed has renamed it: leave it out")]
    zenflow: Annotated[
        None, Reason("it brings an optimizer of its own, which steps at other times than the engine: leave it out")
    ]
    compute_grad_norm: Annotated[On, Reason("the engine clips by the norm: leave it out")]
    round_robin_gradients: Annotated[
        Off,
        Reason(
            "DeepSpeed looks up a parameter's fp32 weights and gradient in the order before that reordering: "
            "leave it out"
        ),
    ]
    legacy_stage1: Annotated[Off, Reason("DeepSpeed has removed that stage 1: leave it out")]
    zero_quantized_weights: Annotated[Off, Reason(QUANTIZED)]
    zero_quantized_nontrainable_weights: Annotated[Off, Reason(QUANTIZED)]
    zero_quantized_gradients: Annotated[Off, Reason(QUANTIZED)]


class DeepSpeedSection(TypedDict, total=False):
    """Every key that is allowed."""

    activation_checkpointing: ActivationCheckpointing
    aio: Aio
    comms_logger: CommsLogger
    dump_state: bool
    flops_profiler: FlopsProfiler
    memory_breakdown: bool
    timers: Timers
    wall_clock_breakdown: bool
    zero_allow_untested_optimizer: Annotated[On, Reason("the engine brings AdamW, tested or not: leave it out")]
    zero_force_ds_cpu_optimizer: Annotated[Off, Reason("the engine brings PyTorch's AdamW: leave it out")]
    zero_optimization: ZeroOptimization


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def allowed(name: str, kind: Any, values: Any) -> dict[str, Any]:
    """The values of a mapping, checked key by key; null and Hugging Face's "auto" mean that a key is not given.

    Args:
        kind: the TypedDict of its keys.

    Raises:
        ConfigError: a key that is not allowed, or a value that is not of its type.
    """
    require(isinstance(values, dict), f"{name} is {shown(values)}, but must be a mapping: write its keys below it")
    hints, found = _types(kind), {}
    for written, value in values.items():
        # DeepSpeed knows the keys of stage 3 without their prefix, too
        key = f"stage3_{written}" if f"stage3_{written}" in hints else written
        require(key not in found, f"{name}.{written} and {name}.{key} are both set, but mean the same: remove one")
        if is_typeddict(hints.get(key)):
            found[key] = allowed(f"{name}.{key}", hints[key], value)
            continue
        if key not in hints:
            close = difflib.get_close_matches(str(key), list(hints), n=1)
            remedy = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(hints)}"
            raise ConfigError(f"unknown key {name}.{key}: {remedy}")
        found[key] = checked(f"{name}.{key}", hints[key], value, "correct it, or leave it out")
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
    return allowed("deepspeed", DeepSpeedSection, values)
