"""What must hold in a configuration before anything else is looked at; messages name value, rule and remedy.

Checks that need the number of ranks are in `batch.py`, DeepSpeed's own keys in `deepspeed_settings.py`, files and
tokenizer in `data_checks.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_crnet.errors import ConfigError
from megatron_crnet.ranks import resolve_full_rank_layers, resolve_ranks

if TYPE_CHECKING:
    from megatron_crnet.config import Config, ModelConfig, OptimizerConfig, ParallelConfig


def check_config(config: Config) -> None:
    """Every rule, in an order in which each may rely on those before it.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    check_model(config.model)
    check_training(config)
    check_optimizer(config.optimizer, config.training.train_steps)
    check_parallel(config)
    check_pipeline(config)
    check_recompute(config)
    check_deepspeed(config)


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(section: str, **values: float) -> None:
    """Refuse values below one (integers) or not above zero (floats)."""
    for name, value in values.items():
        require(value > 0, f"{section}.{name} is {value}, but must be above 0: give a positive number")


def check_model(model: ModelConfig) -> None:
    """The model's sizes agree with each other, and rank resolves to a table."""
    require_positive(
        "model",
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        vocab_size=model.vocab_size,
        cross_layer_epsilon=model.cross_layer_epsilon,
        layernorm_epsilon=model.layernorm_epsilon,
        rotary_base=model.rotary_base,
        init_method_std=model.init_method_std,
    )
    h, heads = model.hidden_size, model.num_attention_heads
    require(
        h % heads == 0,
        f"model.hidden_size {h} does not divide by model.num_attention_heads {heads}: "
        f"use hidden_size {h // heads * heads or heads} or {(h // heads + 1) * heads}",
    )
    require(
        (h // heads) % 2 == 0,
        f"model.hidden_size {h} / num_attention_heads {heads} gives heads of width {h // heads}, but "
        "rotary embeddings need an even width: change one of the two",
    )
    if model.num_query_groups is not None:
        require_positive("model", num_query_groups=model.num_query_groups)
        require(
            heads % model.num_query_groups == 0,
            f"model.num_attention_heads {heads} does not divide by model.num_query_groups "
            f"{model.num_query_groups}: use a divisor of {heads}",
        )
    for name in ("hidden_dropout", "attention_dropout"):
        value = getattr(model, name)
        require(0 <= value < 1, f"model.{name} is {value}, but must lie in [0, 1): lower it")
    full = resolve_full_rank_layers(model.variant, model.full_rank_layers, model.num_layers)
    resolve_ranks(model.rank, model.num_layers, full)


def check_training(config: Config) -> None:
    """Step counts, batch sizes and the logging intervals."""
    training = config.training
    require_positive(
        "training",
        train_steps=training.train_steps,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        seq_length=training.seq_length,
    )
    require_positive("logging", log_interval=config.logging.log_interval)
    for section, name in (
        ("training", "eval_interval"),
        ("training", "eval_steps"),
        ("checkpoint", "save_interval"),
        ("data", "num_workers"),
        ("logging", "sample_tokens"),
    ):
        value = getattr(getattr(config, section), name)
        require(value >= 0, f"{section}.{name} is {value}, but must not be negative: use 0 or more")
    limit = config.model.max_position_embeddings
    require(
        limit is None or limit >= training.seq_length,
        f"model.max_position_embeddings {limit} is below training.seq_length {training.seq_length}: "
        "raise the first or lower the second",
    )


def check_optimizer(optimizer: OptimizerConfig, train_steps: int) -> None:
    """Ranges of AdamW's and the schedule's numbers."""
    require_positive("optimizer", lr=optimizer.lr, adam_eps=optimizer.adam_eps)
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(optimizer, name)
        require(0 <= value < 1, f"optimizer.{name} is {value}, but must lie in [0, 1): lower it")
    require(
        0 <= optimizer.min_lr_ratio <= 1,
        f"optimizer.min_lr_ratio is {optimizer.min_lr_ratio}, but must lie in [0, 1]: give a share of lr",
    )
    for name in ("lr_warmup_steps", "weight_decay", "clip_grad"):
        value = getattr(optimizer, name)
        require(value >= 0, f"optimizer.{name} is {value}, but must not be negative: use 0 or more")
    warmup, decay = optimizer.lr_warmup_steps, optimizer.lr_wsd_decay_steps
    require(
        warmup < max(train_steps, 1),
        f"optimizer.lr_warmup_steps {warmup} is not below training.train_steps {train_steps}: lower it or train more",
    )
    if optimizer.lr_decay_style == "wsd" and decay is not None:
        require_positive("optimizer", lr_wsd_decay_steps=decay)
        require(
            warmup + decay <= train_steps,
            f"optimizer.lr_warmup_steps {warmup} and lr_wsd_decay_steps {decay} are more than training.train_steps "
            f"{train_steps} together: lower one or train longer",
        )


def check_parallel(config: Config) -> None:
    """Widths divide by the tensor-parallel size, layers by the pipeline's."""
    parallel, model = config.parallel, config.model
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size or 1
    require_positive(
        "parallel",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    groups = model.num_query_groups or model.num_attention_heads
    for section, name, value in (
        ("model", "num_attention_heads", model.num_attention_heads),
        ("model", "num_query_groups", groups),
        ("model", "ffn_hidden_size", model.ffn_hidden_size),
        ("model", "vocab_size", model.vocab_size),
        ("training", "seq_length", config.training.seq_length),
    ):
        if name == "seq_length" and not sequence_parallel(parallel):
            continue
        require(
            value % tp == 0,
            f"{section}.{name} {value} does not divide by parallel.tensor_model_parallel_size {tp}: "
            f"use {value // tp * tp or tp} or {(value // tp + 1) * tp}, or another tensor-parallel size",
        )
    require(
        not (parallel.sequence_parallel and tp == 1),
        "parallel.sequence_parallel is true with tensor_model_parallel_size 1, but there is nobody to share "
        "the sequence with: leave it out or raise tensor_model_parallel_size",
    )
    require(
        vpp == 1 or pp > 1,
        f"parallel.virtual_pipeline_model_parallel_size {vpp} needs pipeline_model_parallel_size above 1, "
        f"not {pp}: raise the second or leave the first out",
    )


def check_pipeline(config: Config) -> None:
    """Layers can be spread over stages and virtual stages as asked."""
    parallel, layers = config.parallel, config.model.num_layers
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    uneven = {
        name: value
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        if (value := getattr(parallel, name)) is not None
    }
    for name, value in uneven.items():
        require_positive("parallel", **{name: value})
        require(pp > 1, f"parallel.{name} {value} needs pipeline_model_parallel_size above 1, not {pp}: leave it out")
        require(
            value % vpp == 0,
            f"parallel.{name} {value} does not divide by virtual_pipeline_model_parallel_size {vpp}: use "
            f"{value // vpp * vpp or vpp} or {(value // vpp + 1) * vpp}",
        )
    rest, stages = layers - sum(uneven.values()), pp - len(uneven)
    if stages == 0:
        require(
            rest == 0,
            f"parallel.num_layers_in_first_pipeline_stage and _last_ place {sum(uneven.values())} layers on 2 stages, "
            f"but model.num_layers is {layers}: make them add up",
        )
        return
    unit = stages * vpp
    require(
        rest > 0 and rest % unit == 0,
        f"model.num_layers {layers} leaves {rest} layers for {stages} pipeline stages of {vpp} virtual ones: use "
        f"{layers - rest + max(rest // unit, 1) * unit} or {layers - rest + max(rest // unit + 1, 1) * unit} layers, "
        "or set parallel.num_layers_in_first_pipeline_stage",
    )


def sequence_parallel(parallel: ParallelConfig) -> bool:
    """Whether the residual stream is sharded along the sequence."""
    if parallel.sequence_parallel is None:
        return parallel.tensor_model_parallel_size > 1
    return parallel.sequence_parallel


def check_recompute(config: Config) -> None:
    """Only what exists is accepted."""
    strategy = config.recompute.strategy
    require(
        strategy == "none",
        f"recompute.strategy is {strategy}, but activation recomputation is not built yet: use none",
    )


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


def zero_stage(config: Config) -> int:
    """DeepSpeed's ZeRO stage, 0 when the section does not say."""
    section = config.deepspeed.get("zero_optimization", {})
    return int(section.get("stage", 0)) if isinstance(section, dict) else 0


def check_deepspeed(config: Config) -> None:
    """Keys that would fight the other sections, and stages that do not exist."""
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
    pp = config.parallel.pipeline_model_parallel_size
    require(
        pp == 1 or stage <= 1,
        f"deepspeed.zero_optimization.stage {stage} does not work with pipeline_model_parallel_size {pp}, because "
        "DeepSpeed cannot partition gradients that a pipeline schedule accumulates: use stage 1",
    )
    check_offload(config, section, stage)


def check_offload(config: Config, section: dict[str, Any], stage: int) -> None:
    """Offload works where DeepSpeed keeps gradients in a form that the other parallelism can reach."""
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    if "offload_param" in section:
        require(
            stage == 3,
            f"deepspeed.zero_optimization.offload_param needs ZeRO-3, not stage {stage}, because only stage 3 "
            "partitions parameters: use stage 3 or offload_optimizer",
        )
    if "offload_optimizer" not in section:
        return
    require(
        stage >= 1,
        "deepspeed.zero_optimization.offload_optimizer needs ZeRO 1, 2 or 3, not stage 0: use stage 1",
    )
    require(
        tp == 1,
        f"deepspeed.zero_optimization.offload_optimizer does not work with tensor_model_parallel_size {tp}, because "
        "DeepSpeed moves gradients to the host before they can be summed over tensor-parallel ranks: use "
        "tensor_model_parallel_size 1, or leave offload_optimizer out",
    )
    require(
        pp == 1,
        f"deepspeed.zero_optimization.offload_optimizer does not work with pipeline_model_parallel_size {pp}, because "
        "DeepSpeed's host copies are filled by hooks that a pipeline schedule does not run: use "
        "pipeline_model_parallel_size 1 with ZeRO 2 or 3, or leave offload_optimizer out",
    )
