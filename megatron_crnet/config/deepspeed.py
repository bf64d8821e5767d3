"""The `deepspeed` section: its ZeRO settings, the combinations that are refused, and the JSON for DeepSpeed.

The keys and their types are in `config/deepspeed_keys.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_crnet.config.deepspeed_keys import DEEPSPEED_KEYS
from megatron_crnet.config.field_types import shown
from megatron_crnet.config.positions import METHODS, ties_head
from megatron_crnet.utils.errors import require

if TYPE_CHECKING:
    from megatron_crnet.config.schema import Config

DEFAULT_BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size, in elements."""
ONLY_STAGE_3 = {
    "offload_param",
    "sub_group_size",
    "zero_hpz_partition_size",
    *(key for key in DEEPSPEED_KEYS["zero_optimization"] if key.startswith("stage3_")),
}
"""Keys of `zero_optimization` that the other stages do not read."""

ON_DEVICE_ONLY = {
    "adamw8bit": "whose moments are neither updated on the host nor moved to disks",
    "galore": "whose projected moments belong to whole matrices, not to what DeepSpeed moves to the host",
}
"""Optimizers that cannot be offloaded, and why."""


def zero_stage(config: Config) -> int:
    """DeepSpeed's ZeRO stage, by default 0."""
    return int(_zero(config).get("stage", 0))


def keys_for_stage(section: dict[str, Any], stage: int) -> dict[str, Any]:
    """`zero_optimization` at another stage, without the keys that this stage refuses."""
    unread = (ONLY_STAGE_3 if stage < 3 else set()) | ({"overlap_comm"} if stage < 2 else set())
    return {key: value for key, value in section.items() if key not in unread} | {"stage": stage}


def zero_option(config: Config, key: str, default: int) -> int:
    """A number of `zero_optimization`."""
    return int(_zero(config).get(key, default))


def reduce_bucket_size(config: Config, elements: int) -> int:
    """Elements of the buffer in which ZeRO reduces gradients; by default at most the parameters of the rank.

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
    stage, (tp, pp, _) = zero_stage(config), config.parallel.sizes
    require(
        pp == 1 or stage <= 1,
        f"deepspeed.zero_optimization.stage {stage} does not work with pipeline_model_parallel_size {pp}, because "
        "DeepSpeed cannot partition gradients that a pipeline schedule accumulates: use stage 1",
    )
    require(
        stage > 0 or not config.training.bf16 or tp * pp == 1,
        f"deepspeed.zero_optimization.stage 0 does not work with training.dtype bf16, tensor_model_parallel_size {tp} "
        f"and pipeline_model_parallel_size {pp}, because DeepSpeed's bf16 wrapper counts only the first "
        "tensor-parallel rank in the gradient norm and hangs between pipeline stages: use stage 1",
    )
    require(
        not (pp > 1 and stage > 0 and config.optimizer.name == "adamw8bit" and ties_head(config.model)),
        f"optimizer.name is adamw8bit with a tied output layer and pipeline_model_parallel_size {pp}, but ZeRO stage "
        f"{stage} cuts the embedding and its copy on the last stage at different places, so blocks of 8-bit moments "
        "would round them differently: use adamw, stage 0 in fp32, or set model.tie_word_embeddings false",
    )
    for key, broken, why in _zero_rules(config, stage, tp, pp):
        value = shown(_zero(config).get(key))
        require(not broken, f"deepspeed.zero_optimization.{key} is {value}, but {why}")
    require(
        not (offloads_optimizer(config) and config.faults.on_bad_step == "skip"),
        "faults.on_bad_step is skip, but deepspeed.zero_optimization.offload_optimizer is on, under which DeepSpeed "
        "keeps dropped gradients and drops the step after them, too: use on_bad_step stop, or no offload",
    )


def _zero_rules(config: Config, stage: int, tp: int, pp: int) -> Iterator[tuple[str, bool, str]]:
    """A key of `zero_optimization`, whether it breaks a rule, and the rule with its remedy."""
    zero = _zero(config)
    yield (
        "offload_param",
        offloads_parameters(config) and stage < 3,
        f"only stage 3 partitions parameters, not stage {stage}: use stage 3 or offload_optimizer",
    )
    yield from (("offload_optimizer", *rule) for rule in _offload_rules(config, stage, tp, pp))
    for key in ("offload_param", "offload_optimizer"):
        on_disk = _device(zero, key) == "nvme" and "nvme_path" not in zero[key]
        yield key, on_disk, "device nvme needs a folder on a disk: add nvme_path"
    yield (
        "overlap_comm",
        bool(zero.get("overlap_comm")) and stage <= 1,
        f"gradients of stage {stage} are reduced once after the last backward pass, beside which nothing can run: "
        "leave it out, or use stage 2 or 3",
    )
    for key in ONLY_STAGE_3 - {"offload_param"}:
        yield key, key in zero and stage < 3, f"stage {stage} does not read it: use stage 3 or leave it out"
    merges = METHODS[config.model.variant].has_frozen
    for key, broken in (
        ("offload_param", _device(zero, "offload_param") == "nvme"),
        ("offload_optimizer", _device(zero, "offload_optimizer") == "nvme"),
        ("zero_hpz_partition_size", zero.get("zero_hpz_partition_size", 1) != 1),
    ):
        where = "copies of frozen weights that merges do not reach" if "hpz" in key else "weights or moments on disks"
        yield key, merges and broken, f"model.variant is {config.model.variant}, and it keeps {where}: leave it out"
    yield (
        "zero_hpz_partition_size",
        zero.get("zero_hpz_partition_size", 1) != 1 and tp > 1,
        "DeepSpeed builds its secondary groups of consecutive ranks, which hold different shards under "
        f"tensor_model_parallel_size {tp}: use tensor_model_parallel_size 1, or leave it out",
    )


def _offload_rules(config: Config, stage: int, tp: int, pp: int) -> Iterator[tuple[bool, str]]:
    """Of `offload_optimizer`: whether it breaks a rule, and the rule with its remedy."""
    on_host, on_disk = offloads_optimizer(config), _device(_zero(config), "offload_optimizer") == "nvme"
    yield (
        on_host and stage == 0,
        "stage 0 partitions nothing that could be moved: use stage 1, 2 or 3",
    )
    why = ON_DEVICE_ONLY.get(config.optimizer.name, "")
    yield (
        on_host and bool(why),
        f"optimizer.name is {config.optimizer.name}, {why}: use adamw, or leave offload_optimizer out",
    )
    yield (
        on_host and tp > 1,
        "DeepSpeed moves gradients to the host before they can be summed over the tensor-parallel ranks of "
        f"tensor_model_parallel_size {tp}: use tensor_model_parallel_size 1, or leave offload_optimizer out",
    )
    yield (
        on_host and pp > 1,
        f"DeepSpeed's host copies are filled by hooks that the schedule of pipeline_model_parallel_size {pp} does "
        "not run: use pipeline_model_parallel_size 1, or leave offload_optimizer out",
    )
    yield (
        on_disk and stage < 3,
        f"DeepSpeed keeps the state of stage {stage} in host memory without saying so: use stage 3, or device cpu",
    )
    yield (
        on_disk and bool(config.rank_schedule.ranks),
        "rank_schedule changes ranks, and weights and moments on disks cannot take another shape: use device cpu",
    )


def is_plain(config: Config) -> bool:
    """Whether DeepSpeed runs the bare optimizer, without a wrapper that computes the gradient norm.

    Its own clipping is off then, because it leaves out the parameters of all pipeline stages but the first.
    """
    return zero_stage(config) == 0 and not config.training.bf16


def deepspeed_config(config: Config, dp_size: int, elements: int) -> dict[str, Any]:
    """The JSON of a run on `dp_size` data-parallel ranks.

    Args:
        elements: parameters of this rank's part of the model, before ZeRO partitions it.
    """
    bf16, stage = config.training.bf16, zero_stage(config)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "train_batch_size": config.training.micro_batch_size * dp_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if is_plain(config) else config.optimizer.clip_grad,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    if bf16 and stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        # DeepSpeed's default would round the fp32 sums to bf16 before they are added up over replicas
        settings["communication_data_type"] = "fp32"
    if bf16 and stage == 1:
        # hooks of our own do that (`engine/zero.py`)
        settings["bf16"]["immediate_grad_update"] = False
    if stage > 0:
        zero = config.deepspeed["zero_optimization"]
        settings["zero_optimization"] = {**zero, "reduce_bucket_size": reduce_bucket_size(config, elements)}
    # DeepSpeed's timers would wait for the device before each micro-batch
    return {"timers": {"throughput": {"enabled": False}}, **config.deepspeed, **settings}
