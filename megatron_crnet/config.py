"""The whole configuration: one frozen dataclass a section, and the rules that need no other file.

Field names are Megatron-Core's where it has one; the `deepspeed` section is DeepSpeed's own JSON.
Checks that need the number of ranks live in `batch.py`, checks that need the tokenizer in `data.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_crnet.errors import ConfigError
from megatron_crnet.ranks import FULL_RANK, Rank, resolve_full_rank_layers, resolve_ranks

Variant = Literal["crnet", "full_rank", "low_rank", "cola"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder-only LLaMA-2 block that CR-Net is built on (arXiv 2509.18993)."""

    variant: Variant = "crnet"
    """crnet: Y_l = s(beta_l) Y_{l-1} + X_l A_l B_l. low_rank: X A B. cola: B silu(X A) (arXiv
    2502.10940). full_rank: X W, the plain LLaMA-2."""
    num_layers: int = 8
    """Transformer layers."""
    hidden_size: int = 256
    """Width h of the residual stream."""
    ffn_hidden_size: int = 688
    """Width f of the SwiGLU feed-forward network."""
    num_attention_heads: int = 8
    """Query heads; hidden_size must divide by it."""
    num_query_groups: int | None = None
    """Key-value heads (grouped-query attention); null means one for each query head."""
    vocab_size: int = 32000
    """Rows of the embedding and of the output layer; at least the tokenizer's size."""
    max_position_embeddings: int | None = None
    """Longest sequence the model is meant for, written into exports; null means training.seq_length."""
    rank: Rank = 128
    """Rank r of the low-rank maps: an integer, a list with one for each layer, or a mapping of the
    positions q, k, v, o, gate, up, down to either."""
    full_rank_layers: list[int] | None = None
    """Layers (from 0) with full-rank weights, which start a new cross-layer chain. null means [0] for
    crnet, [] for low_rank and cola, all for full_rank."""
    beta_init: float = 1.0
    """Initial value of every beta, the coefficient of the previous layer's output."""
    cross_layer_epsilon: float = 1e-6
    """eps of s(b) = sign(b)(|b| + eps), which keeps s away from zero."""
    layernorm_epsilon: float = 1e-6
    """eps of RMSNorm."""
    rotary_base: int = 10000
    """Base of the rotary position embedding (rotate-half form)."""
    init_method_std: float = 0.02
    """Standard deviation of full-rank weights and embeddings; A and B are drawn so that A B has it."""
    hidden_dropout: float = 0.0
    """Dropout on the attention and feed-forward outputs before they join the residual stream."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities."""


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    data_path: list[str] = field(default_factory=list)
    """Prefixes of Megatron .bin/.idx pairs, split by `split`; or weight prefix weight prefix ..."""
    train_data_path: list[str] = field(default_factory=list)
    """As data_path, for training alone; then `split` is not used and data_path must be empty."""
    valid_data_path: list[str] = field(default_factory=list)
    """As data_path, for validation alone."""
    test_data_path: list[str] = field(default_factory=list)
    """As data_path, for the final test alone."""
    split: str = "969,30,1"
    """Relative sizes of train, validation and test when they come from the same data_path."""
    sample_format: Literal["packed", "padded"] = "packed"
    """packed: documents joined and cut at seq_length (Megatron's GPTDataset). padded: one document a
    row, truncated or padded, padding not trained on (the papers' protocol)."""
    tokenizer_type: Literal["sentencepiece", "huggingface"] = "sentencepiece"
    """How tokenizer_model is read."""
    tokenizer_model: str | None = None
    """A SentencePiece .model file, or a folder with a Hugging Face tokenizer."""
    cache_path: str | None = None
    """Folder of Megatron's index caches; null means a folder `cache` beside the first .bin."""
    num_workers: int = 0
    """Processes that read ahead, for each rank; 0 reads in the training process."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how much at once, in which precision."""

    train_steps: int = 1000
    """Optimizer steps of the whole run."""
    micro_batch_size: int = 8
    """Sequences in one forward pass of one rank."""
    global_batch_size: int = 8
    """Sequences in one optimizer step over all ranks."""
    seq_length: int = 256
    """Tokens in a sequence."""
    dtype: Literal["bf16", "fp32"] = "fp32"
    """Precision of weights and activations; master weights, moments and beta stay fp32."""
    seed: int = 1234
    """Seed of the initial weights, of the order of the data and of dropout."""
    eval_interval: int = 100
    """Steps between validations; 0 validates only at the end."""
    eval_steps: int = 10
    """Global batches in one validation; 0 switches validation off."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the learning rate over time."""

    lr: float = 1e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak."""
    lr_decay_style: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine; wsd: warm-up, stable, then a decay over lr_wsd_decay_steps; constant."""
    lr_warmup_steps: int = 100
    """Steps of linear warm-up."""
    lr_wsd_decay_steps: int | None = None
    """Steps of wsd's final decay; null means a tenth of train_steps."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """Shape of wsd's final decay."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; beta and norm weights get none."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over ranks; what is left over is data parallelism."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Groups of layers on different ranks."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Groups of layers on each pipeline rank (interleaved schedule); null or 1 means one."""
    sequence_parallel: bool | None = None
    """Shard the residual stream along the sequence; null means on when tensor parallelism is."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first pipeline rank, where layers are not spread evenly."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last pipeline rank, where layers are not spread evenly."""
    overlap_tp_communication: bool = True
    """On CUDA, run the gathers and scatters of the low-rank products' backward beside independent work."""
    distributed_timeout_minutes: float = 10.0
    """How long a rank waits for its peers before the run is stopped."""


@dataclass(frozen=True)
class RecomputeConfig:
    """Activation recomputation."""

    strategy: Literal["none", "replay", "inverse", "full"] = "none"
    """none keeps every activation; the others arrive with the recomputation work."""
    segment_length: int | Literal["auto"] = "auto"
    """Layers in a segment."""
    keep_attention_output: bool = False
    """Keep the attention output instead of recomputing it."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When and where training state is saved."""

    dir: str | None = None
    """Folder of the checkpoints; null means `checkpoints` inside logging.output_dir."""
    save_interval: int = 0
    """Steps between checkpoints; 0 saves only at the end."""


@dataclass(frozen=True)
class LoggingConfig:
    """What a run leaves behind."""

    output_dir: str = "runs/default"
    """Folder of metrics.jsonl, config.yaml, TensorBoard files and loss.png."""
    log_interval: int = 10
    """Steps between metric lines."""
    wandb_project: str | None = None
    """Weights & Biases project; null switches it off."""
    sample_prompt: str | None = None
    """Text that is continued and printed at the end of training; null prints none."""
    sample_tokens: int = 64
    """Tokens of that continuation."""


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's JSON as it stands; keys that the other sections own are refused."""

    def __post_init__(self) -> None:
        check_model(self.model)
        check_training(self)
        check_optimizer(self.optimizer, self.training.train_steps)
        check_parallel(self)
        check_pipeline(self)
        check_recompute(self)
        check_deepspeed(self)


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


__all__ = [
    "FULL_RANK",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RecomputeConfig",
    "TrainingConfig",
    "Variant",
]
