"""The `deepspeed` section: the keys that are allowed, their types, and what the layout asks of them.

DeepSpeed ignores keys that it does not know and misreads many combinations without a word, so that only what is known
to work here is allowed. Reasons stand where a key's absence would make a user wonder.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_type_hints, is_typeddict

from annotated_types import Ge, Le, MultipleOf
from pydantic import AfterValidator, BeforeValidator

from megatron_crnet.errors import require
from megatron_crnet.field_types import Count, FilePath, Name, PositiveCount, Reason, Rule, checked, shown

if TYPE_CHECKING:
    from megatron_crnet.config import Config

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

DEFAULT_BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size, in elements."""


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
            "metrics' MFU and tools/estimate.py"
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
    """Where kept activations live (docs/recompute.md)."""

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


ONLY_STAGE_3 = {
    "offload_param",
    "sub_group_size",
    "zero_hpz_partition_size",
    *(key for key in ZeroOptimization.__annotations__ if key.startswith("stage3_")),
}
"""Keys of `zero_optimization` that the other stages do not read."""


def allowed(name: str, kind: Any, values: Any) -> dict[str, Any]:
    """The values of a mapping, checked key by key; null and Hugging Face's "auto" mean that a key is not given.

    Args:
        kind: the TypedDict of its keys.

    Raises:
        ConfigError: a key that is not allowed, or a value that is not of its type.
    """
    require(isinstance(values, dict), f"{name} is {shown(values)}, but must be a mapping: write its keys below it")
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for written, value in values.items():
        # DeepSpeed knows the keys of stage 3 without their prefix, too
        key = f"stage3_{written}" if f"stage3_{written}" in hints else written
        require(key not in found, f"{name}.{written} and {name}.{key} are both set, but mean the same: remove one")
        if is_typeddict(hints.get(key)):
            found[key] = allowed(f"{name}.{key}", hints[key], value)
            continue
        close = difflib.get_close_matches(str(key), list(hints), n=1)
        remedy = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(hints)}"
        require(key in hints, f"unknown key {name}.{key}: {remedy}")
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


def zero_stage(config: Config) -> int:
    """DeepSpeed's ZeRO stage, 0 when the section does not say."""
    return int(_zero(config).get("stage", 0))


def keys_for_stage(section: dict[str, Any], stage: int) -> dict[str, Any]:
    """A `zero_optimization` mapping at another stage: without the keys that stage refuses whatever their value."""
    unread = (ONLY_STAGE_3 if stage < 3 else set()) | ({"overlap_comm"} if stage < 2 else set())
    return {key: value for key, value in section.items() if key not in unread} | {"stage": stage}


def zero_option(config: Config, key: str, default: int) -> int:
    """A number of `zero_optimization`."""
    return int(_zero(config).get(key, default))


def reduce_bucket_size(config: Config, elements: int) -> int:
    """Elements of the buffer in which ZeRO sums gradients: never more than a rank has parameters, unless it is given.

    Args:
        elements: parameters of this rank's part of the model, before ZeRO partitions it.
    """
    return zero_option(config, "reduce_bucket_size", max(1, min(DEFAULT_BUCKET, elements)))


def offloads_optimizer(config: Config) -> bool:
    """Whether the optimizer runs on the host."""
    return _device(_zero(config), "offload_optimizer") != "none"


def offloads_parameters(config: Config) -> bool:
    """Whether weights live on the host (or its disks) between their uses."""
    return _device(_zero(config), "offload_param") != "none"


def _zero(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = config.deepspeed.get("zero_optimization", {})
    return found


def _device(zero: dict[str, Any], key: str) -> str:
    return str(zero.get(key, {}).get("device", "none"))


def check_deepspeed(config: Config) -> None:
    """Combinations that DeepSpeed gets wrong.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    zero, stage = _zero(config), zero_stage(config)
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    _check_stage(stage, tp, pp, config.training.dtype)
    _check_offload(zero, stage, tp, pp)
    require(
        not (offloads_optimizer(config) and config.faults.on_bad_step == "skip"),
        "faults.on_bad_step is skip, but deepspeed.zero_optimization.offload_optimizer is on, under which DeepSpeed "
        "keeps dropped gradients and drops the step after them, too: use on_bad_step stop, or no offload",
    )
    _refuse(
        zero,
        "overlap_comm",
        bool(zero.get("overlap_comm")) and stage <= 1,
        f"gradients of stage {stage} are reduced once after the last backward pass, beside which nothing can run: "
        "leave it out, or use stage 2 or 3",
    )
    for key in ONLY_STAGE_3 - {"offload_param"}:
        _refuse(zero, key, key in zero and stage < 3, f"stage {stage} does not read it: use stage 3 or leave it out")
    _refuse(
        zero,
        "zero_hpz_partition_size",
        zero.get("zero_hpz_partition_size", 1) != 1 and tp > 1,
        "DeepSpeed builds its secondary groups of consecutive ranks, which hold different shards under "
        f"tensor_model_parallel_size {tp}: use tensor_model_parallel_size 1, or leave it out",
    )


def _refuse(zero: dict[str, Any], key: str, broken: bool, why: str) -> None:
    require(not broken, f"deepspeed.zero_optimization.{key} is {shown(zero.get(key))}, but {why}")


def _check_offload(zero: dict[str, Any], stage: int, tp: int, pp: int) -> None:
    """What is moved to the host can be moved in this layout."""
    moves = _device(zero, "offload_optimizer") != "none"
    _refuse(
        zero,
        "offload_param",
        _device(zero, "offload_param") != "none" and stage < 3,
        f"only stage 3 partitions parameters, not stage {stage}: use stage 3 or offload_optimizer",
    )
    for broken, why in (
        (stage == 0, "stage 0 partitions nothing that could be moved: use stage 1, 2 or 3"),
        (
            tp > 1,
            "DeepSpeed moves gradients to the host before they can be summed over the tensor-parallel ranks of "
            f"tensor_model_parallel_size {tp}: use tensor_model_parallel_size 1, or leave offload_optimizer out",
        ),
        (
            pp > 1,
            f"DeepSpeed's host copies are filled by hooks that the schedule of pipeline_model_parallel_size {pp} does "
            "not run: use pipeline_model_parallel_size 1, or leave offload_optimizer out",
        ),
        (
            _device(zero, "offload_optimizer") == "nvme" and stage < 3,
            f"DeepSpeed keeps the state of stage {stage} in host memory without saying so: use stage 3, or device cpu",
        ),
    ):
        _refuse(zero, "offload_optimizer", moves and broken, why)
    for key in ("offload_param", "offload_optimizer"):
        on_disk = _device(zero, key) == "nvme" and "nvme_path" not in zero[key]
        _refuse(zero, key, on_disk, "device nvme needs a folder on a disk: add nvme_path")


def _check_stage(stage: int, tp: int, pp: int, dtype: str) -> None:
    """The stage suits pipeline, tensor parallelism and precision."""
    require(
        pp == 1 or stage <= 1,
        f"deepspeed.zero_optimization.stage {stage} does not work with pipeline_model_parallel_size {pp}, because "
        "DeepSpeed cannot partition gradients that a pipeline schedule accumulates: use stage 1",
    )
    require(
        stage > 0 or dtype != "bf16" or tp * pp == 1,
        f"deepspeed.zero_optimization.stage 0 does not work with training.dtype bf16, tensor_model_parallel_size {tp} "
        f"and pipeline_model_parallel_size {pp}, because DeepSpeed's bf16 wrapper counts only the first "
        "tensor-parallel rank in the gradient norm and hangs between pipeline stages: use stage 1",
    )
