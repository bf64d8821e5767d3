"""What of the `deepspeed` section is refused, and why.

DeepSpeed ignores or misreads many combinations without a word. Whether a key exists at all is checked in
`deepspeed_settings.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from megatron_crnet.errors import require

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
    "gradient_predivide_factor": "the engine, which averages gradients once,",
    "prescale_gradients": "the engine, which averages gradients once,",
    "managed_gradient_accumulation": "the engine",
}


@dataclass(frozen=True)
class Layout:
    """What a rule about a key depends on besides its value."""

    stage: int
    tp: int
    pp: int


@dataclass(frozen=True)
class Rule:
    """A value of `zero_optimization` that is refused.

    Attributes:
        key: name, with dots into nested mappings.
        broken: whether this value in this layout is refused; a key that is absent or null never is.
        why: completes "is VALUE, but ..."; may name the fields of Layout in braces.
        remedy: what to write instead.
    """

    key: str
    broken: Callable[[Any, Layout], bool]
    why: str
    remedy: str


def _always(value: Any, layout: Layout) -> bool:
    return True


def _on(value: Any, layout: Layout) -> bool:
    return bool(value)


def _below_3(value: Any, layout: Layout) -> bool:
    return layout.stage < 3


def _offloads(value: Any) -> bool:
    """Whether an offload_optimizer or offload_param mapping moves anything; DeepSpeed's default device is none."""
    return isinstance(value, dict) and value.get("device", "none") != "none"


STAGE_3_KEYS = (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "gather_16bit_weights_on_model_save",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
)

RULES = (
    Rule("cpu_offload", _always, "DeepSpeed has renamed it", "use offload_optimizer: {device: cpu}"),
    Rule("cpu_offload_param", _always, "DeepSpeed has renamed it", "use offload_param: {device: cpu}"),
    Rule("cpu_offload_use_pin_memory", _always, "DeepSpeed has renamed it", "use offload_optimizer.pin_memory"),
    Rule("stage3_gather_fp16_weights_on_model_save", _always, "DeepSpeed has renamed it", "leave it out"),
    Rule(
        "offload_param",
        lambda value, layout: _offloads(value) and layout.stage < 3,
        "only stage 3 partitions parameters, not stage {stage}",
        "use stage 3 or offload_optimizer",
    ),
    Rule(
        "offload_optimizer",
        lambda value, layout: _offloads(value) and layout.stage == 0,
        "stage 0 partitions nothing that could be moved",
        "use stage 1, 2 or 3",
    ),
    Rule(
        "offload_optimizer",
        lambda value, layout: _offloads(value) and layout.tp > 1,
        "DeepSpeed moves gradients to the host before they can be summed over the tensor-parallel ranks of "
        "tensor_model_parallel_size {tp}",
        "use tensor_model_parallel_size 1, or leave offload_optimizer out",
    ),
    Rule(
        "offload_optimizer",
        lambda value, layout: _offloads(value) and layout.pp > 1,
        "DeepSpeed's host copies are filled by hooks that the schedule of pipeline_model_parallel_size {pp} does not "
        "run",
        "use pipeline_model_parallel_size 1, or leave offload_optimizer out",
    ),
    Rule(
        "offload_optimizer.device",
        lambda value, layout: value == "nvme" and layout.stage in (1, 2),
        "DeepSpeed keeps the state of stage {stage} in host memory without saying so",
        "use stage 3, or device cpu",
    ),
    Rule(
        "offload_optimizer.super_offload",
        _on,
        "it brings an optimizer of its own, whose gradients the engine does not know",
        "leave it out",
    ),
    Rule(
        "zenflow",
        _always,
        "it brings an optimizer of its own, which steps at other times than the engine",
        "leave it out",
    ),
    Rule("compute_grad_norm", lambda value, layout: not value, "the engine clips by the norm", "leave it out"),
    Rule(
        "round_robin_gradients",
        _on,
        "DeepSpeed looks up a parameter's fp32 weights and gradient in the order before that reordering",
        "leave it out",
    ),
    Rule("legacy_stage1", _on, "DeepSpeed has removed that stage 1", "leave it out"),
    Rule(
        "overlap_comm",
        lambda value, layout: bool(value) and layout.stage <= 1,
        "gradients of stage {stage} are reduced once after the last backward pass, beside which nothing can run",
        "leave it out, or use stage 2 or 3",
    ),
    Rule(
        "allgather_bucket_size",
        lambda value, layout: isinstance(value, int | float) and value % 2 != 0,
        "DeepSpeed aligns its buffers to two elements",
        "use an even number",
    ),
    *(
        Rule(
            key,
            _on,
            "it rounds what ranks exchange to a few bits, in groups of consecutive ranks, which are tensor-parallel "
            "ranks here",
            "leave it out",
        )
        for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
    ),
    Rule(
        "zero_hpz_partition_size",
        lambda value, layout: value != 1 and layout.tp > 1,
        "DeepSpeed builds its secondary groups of consecutive ranks, which hold different shards under "
        "tensor_model_parallel_size {tp}",
        "use tensor_model_parallel_size 1, or leave it out",
    ),
    *(
        Rule(key, _below_3, "stage {stage} does not read it", "use stage 3 or leave it out")
        for key in (
            "sub_group_size",
            "zero_hpz_partition_size",
            *STAGE_3_KEYS,
            *(f"stage3_{key}" for key in STAGE_3_KEYS),
        )
    ),
)


def zero_stage(config: Config) -> int:
    """DeepSpeed's ZeRO stage, 0 when the section does not say."""
    section = config.deepspeed.get("zero_optimization", {})
    return int(section.get("stage", 0)) if isinstance(section, dict) else 0


def keys_for_stage(section: dict[str, Any], stage: int) -> dict[str, Any]:
    """A `zero_optimization` mapping at another stage: without the keys that stage refuses whatever their value."""
    unread = {rule.key for rule in RULES if rule.broken is _below_3} if stage < 3 else set()
    unread |= {"offload_param"} if stage < 3 else set()
    unread |= {"overlap_comm"} if stage < 2 else set()
    return {key: value for key, value in section.items() if key not in unread} | {"stage": stage}


def zero_option(config: Config, key: str, default: int) -> int:
    """A number of `zero_optimization`; DeepSpeed knows the keys of stage 3 with and without `stage3_`.

    Raises:
        ConfigError: it is no number.
    """
    section = config.deepspeed.get("zero_optimization", {})
    value = section.get(key, section.get(key.removeprefix("stage3_")))
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    require(is_number, f"deepspeed.zero_optimization.{key} is {value}, but must be a number: give one, or leave it out")
    return int(value)


def offloads_optimizer(config: Config) -> bool:
    """Whether the optimizer runs on the host."""
    return _offloads(_value(config.deepspeed, "zero_optimization.offload_optimizer"))


def offloads_parameters(config: Config) -> bool:
    """Whether weights live on the host (or its disks) between their uses."""
    return _offloads(_value(config.deepspeed, "zero_optimization.offload_param"))


def check_deepspeed(config: Config) -> None:
    """Keys that would fight the other sections, and combinations that DeepSpeed gets wrong.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    for key, owner in OWNED_BY_OTHER_SECTIONS.items():
        require(
            key not in config.deepspeed,
            f"deepspeed.{key} is set, but {owner} decides this: remove deepspeed.{key}",
        )
    section = config.deepspeed.get("zero_optimization", {})
    require(
        isinstance(section, dict),
        f"deepspeed.zero_optimization is {section!r}, but must be a mapping: write zero_optimization: {{stage: 1}}",
    )
    stage = section.get("stage", 0)
    require(
        stage in (0, 1, 2, 3) and not isinstance(stage, bool),
        f"deepspeed.zero_optimization.stage is {stage!r}, but ZeRO has the stages 0, 1, 2 and 3: use one of them",
    )
    require(
        not (offloads_optimizer(config) and config.faults.on_bad_step == "skip"),
        "faults.on_bad_step is skip, but deepspeed.zero_optimization.offload_optimizer is on, under which DeepSpeed "
        "keeps dropped gradients and drops the step after them, too: use on_bad_step stop, or no offload",
    )
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    _check_stage(stage, tp, pp, config.training.dtype)
    layout = Layout(stage, tp, pp)
    for rule in RULES:
        value = _value(section, rule.key)
        require(
            value is None or not rule.broken(value, layout),
            f"deepspeed.zero_optimization.{rule.key} is {value!r}, but "
            f"{rule.why.format(**asdict(layout))}: {rule.remedy}",
        )


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


def _value(section: Any, key: str) -> Any:
    """The value under a dotted key; None where there is none."""
    for part in key.split("."):
        section = section.get(part) if isinstance(section, dict) else None
    return section
