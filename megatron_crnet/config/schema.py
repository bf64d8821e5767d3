"""The configuration: one frozen dataclass per section, with ranges in the types (`config/field_types.py`).

Field names are Megatron-Core's where it has one; the `deepspeed` section is DeepSpeed's JSON. Rules between fields are
in `config/validation.py`, those that need the number of ranks in `config/batch.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Le

from megatron_crnet.config.deepspeed import check_deepspeed
from megatron_crnet.config.deepspeed_keys import checked_deepspeed
from megatron_crnet.config.distillation_section import DistillationConfig
from megatron_crnet.config.field_types import (
    SMALLEST,
    Count,
    Epsilon,
    FilePath,
    LearningRate,
    Name,
    NonNegative,
    Parallelism,
    Positive,
    PositiveCount,
    Probability,
    Rule,
    Section,
    Seed,
    Share,
    Text,
    shown,
)
from megatron_crnet.config.parallel_section import ParallelConfig
from megatron_crnet.config.positions import Rank, RankSize
from megatron_crnet.config.rank_section import RankScheduleConfig
from megatron_crnet.config.recompute_section import Layers, RecomputeConfig
from megatron_crnet.config.relora_section import ReloraConfig
from megatron_crnet.config.validation import check_config
from megatron_crnet.utils.errors import require

Variant = Literal["crnet", "full_rank", "low_rank", "cola", "relora"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
ArchitectureName = Literal["llama", "gpt2", "qwen3", "qwen3_moe"]
OF_VARIANT: dict[str, Any] = {"full_rank_layers": None, "only_lr_act": None}
"""Fields of the model that fit some variants only, for a change to another: null is each variant's own."""
Width = Annotated[int, Ge(1), Le(2**20)]
DataPaths = Annotated[list[Positive | FilePath], Rule("a list of prefixes, or of a weight above 0 before each prefix")]

StepRange = Annotated[list[PositiveCount], Rule("[first, last], steps from 1")]
LrPart = Literal["embedding", "first_layer", "a", "b", "beta"]
LrMultipliers = Annotated[
    dict[LrPart, NonNegative], Rule(f"a mapping of {', '.join(get_args(LrPart))} to numbers from 0 to 1000000")
]
Ramp = Annotated[list[PositiveCount], Rule("[start, increment, samples], integers from 1")]


@dataclass(frozen=True)
class ModelConfig(Section, name="model"):
    """Shape of the decoder-only transformer that CR-Net is built on (arXiv 2509.18993)."""

    variant: Variant = "crnet"
    """crnet: Y_l = s(beta_l) Y_{l-1} + X_l A_l B_l. low_rank: X A B. cola: B silu(X A) (arXiv 2502.10940), see
    only_lr_act. relora: X W + s X A B, W frozen between restarts (arXiv 2307.05695), see the section relora. full_rank:
    X W, the plain LLaMA-2."""
    architecture: ArchitectureName = "llama"
    """llama; gpt2: LayerNorm, GELU, biases, learned positions; qwen3: an RMSNorm per head of q and k; qwen3_moe: as
    qwen3, with experts."""
    num_layers: Layers = 8
    """Transformer layers."""
    hidden_size: Width = 256
    """Width h of the residual stream."""
    ffn_hidden_size: Annotated[int, Ge(1), Le(2**22)] = 688
    """Width f of the feed-forward network; of each expert in qwen3_moe."""
    num_experts: Annotated[int, Ge(2), Le(65536)] | None = None
    """Experts of a layer, in qwen3_moe alone. No chain passes through them (docs/decisions/experts.md)."""
    full_rank_experts: bool = False
    """Give experts full-rank weights in every layer, beside attention as the variant has it."""
    moe_router_topk: PositiveCount = 8
    """Experts that each token is given to. No token is dropped."""
    moe_router_pre_softmax: bool = False
    """Weigh chosen experts by the softmax over all experts. false: by that over the chosen ones, Transformers'
    norm_topk_prob."""
    moe_aux_loss_coeff: NonNegative = 0.001
    """Coefficient of the load-balancing loss of a layer and micro-batch, in no reported loss; 0 leaves it out."""
    moe_z_loss_coeff: NonNegative = 0.0
    """Coefficient of the mean of logsumexp(router's logits)^2 (arXiv 2202.08906); 0 leaves it out."""
    num_attention_heads: Parallelism = 8
    """Query heads; hidden_size must divide by it, unless kv_channels is set."""
    num_query_groups: Parallelism | None = None
    """Key-value heads (grouped-query attention); null means one per query head."""
    kv_channels: Width | None = None
    """Width d of a head; null means hidden_size / num_attention_heads."""
    vocab_size: Annotated[int, Ge(1), Le(2**24)] = 32000
    """Rows of the embedding and of the output layer; at least the tokenizer's size."""
    max_position_embeddings: PositiveCount | None = None
    """Longest sequence, in exports; null means training.seq_length. gpt2 needs it: it learns a vector per position."""
    tie_word_embeddings: bool | None = None
    """Whether the output layer multiplies by the embedding's weights; null: true for gpt2, else false."""
    rank: Rank = 128
    """Rank r of the low-rank maps: an integer, a list with one per layer, or a mapping of the
    positions q, k, v, o, gate (not in gpt2), up, down to either; of qwen3_moe the last three are each expert's."""
    full_rank_layers: list[Count] | None = None
    """Layers (from 0) of full-rank weights, which start a chain. null: [0] for crnet, all for full_rank, else []."""
    only_lr_act: bool | None = None
    """cola: silu between factors alone, and down(gate up) in SwiGLU's place. null means what CoLA's configurations
    have: true for hidden_size from 1024 on (350M and above), false below."""
    relora_scale: Positive = 0.25
    """relora: s, the authors' alpha / r, 32 / 128."""
    beta_init: Annotated[float, Ge(-1000), Le(1000)] = 1.0
    """Initial value of every beta."""
    cross_layer_epsilon: Epsilon = 1e-6
    """eps of s(b) = sign(b)(|b| + eps), which keeps s away from zero."""
    layernorm_epsilon: Epsilon = 1e-6
    """eps of RMSNorm or LayerNorm."""
    rotary_base: Annotated[int, Ge(1), Le(10**12)] = 10000
    """Base of the rotary position embedding (rotate-half form)."""
    rope_scaling_factor: Annotated[float, Ge(1), Le(1000)] | None = None
    """LLaMA 3.1's scaling of RoPE for sequences longer than 8192: low frequencies are divided by this; null: none."""
    init_method_std: Annotated[float, Ge(SMALLEST), Le(1000)] = 0.02
    """Standard deviation of full-rank weights and embeddings; A and B are drawn so that A B has it."""
    scale_residual_init: bool = False
    """Draw the projections that are added to the residual stream (o and down; of low-rank ones B) smaller by
    1/sqrt(2 num_layers), as GPT-2 does and Megatron-Core by default."""
    hidden_dropout: Probability = 0.0
    """Dropout on the embedding, and on the attention and feed-forward outputs before they join the residual stream."""
    attention_dropout: Probability = 0.0
    """Dropout on attention probabilities."""


@dataclass(frozen=True)
class DataConfig(Section, name="data"):
    """Training, validation and test data."""

    data_path: DataPaths = field(default_factory=list)
    """Prefixes of Megatron .bin/.idx pairs, split by `split`; or weight prefix weight prefix ..., such as
    [0.3, a, 0.7, b]: a number is a weight, text a prefix."""
    train_data_path: DataPaths = field(default_factory=list)
    """As data_path, for training alone; then `split` is not used and data_path must be empty."""
    valid_data_path: DataPaths = field(default_factory=list)
    """As data_path, for validation alone."""
    test_data_path: DataPaths = field(default_factory=list)
    """As data_path, for the test after the last step alone (training.test_steps)."""
    split: Name = "969,30,1"
    """Relative sizes of train, validation and test when they come from the same data_path."""
    sample_format: Literal["packed", "padded"] = "packed"
    """packed: documents joined and cut at seq_length (Megatron's GPTDataset). padded: one document per
    row, truncated or padded, padding masked (the papers' protocol)."""
    reset_attention_mask: bool = False
    """Packed samples: attention stays within documents, which end with the tokenizer's EOD token. false, Megatron's
    default: it reaches over the whole sample, as in most published runs (docs/decisions/documents.md)."""
    reset_position_ids: bool = False
    """Positions start anew with each document; needs reset_attention_mask. Rotary embeddings are relative, so within
    documents this changes rounding alone; learned positions (gpt2) are other vectors."""
    eod_mask_loss: bool = False
    """Packed samples: mask the loss of the token after an EOD. EOD itself is trained."""
    tokenizer_type: Literal["sentencepiece", "huggingface"] = "sentencepiece"
    """How tokenizer_model is read."""
    tokenizer_model: FilePath | None = None
    """A SentencePiece .model file, or a folder with a Hugging Face tokenizer."""
    cache_path: FilePath | None = None
    """Folder of Megatron's index caches; null means a folder `cache` beside the first .bin."""
    num_workers: Annotated[int, Ge(0), Le(1024)] = 0
    """Worker processes per rank that prefetch; 0 reads in the training process."""


@dataclass(frozen=True)
class TrainingConfig(Section, name="training"):
    """Length, batch size and precision of training."""

    train_steps: PositiveCount = 1000
    """Optimizer steps of the whole run."""
    micro_batch_size: Annotated[int, Ge(1), Le(2**20)] = 8
    """Sequences in one forward pass of one rank."""
    global_batch_size: PositiveCount = 8
    """Sequences in one optimizer step over all ranks."""
    rampup_batch_size: Ramp | None = None
    """[start, increment, samples], as Megatron's: steps begin with `start` sequences and grow by `increment` in equal
    parts of the first `samples` sequences, until global_batch_size. train_steps counts steps of any size; the learning
    rate goes by sequences then. null: all steps have global_batch_size."""
    seq_length: Annotated[int, Ge(1), Le(2**24)] = 256
    """Tokens in a sequence."""
    dtype: Literal["bf16", "fp32"] = "fp32"
    """Precision of weights and activations; master weights, moments and beta stay fp32."""
    cross_layer_fusion: bool = True
    """On CUDA, compile what lies between matrix products (norms, RoPE, SwiGLU, the cross-layer residual and their
    gradients) with `torch.compile`, one pass over memory each. false (or no Triton): by PyTorch's operations, which
    round differently."""
    cuda_graphs: bool | None = None
    """On CUDA, launch both passes of a micro-batch as one graph, to the same bits (docs/reporting.md). null: where that
    works, which is bf16 at ZeRO stage 1 with whole models on each rank; true: refuse other configurations."""
    deterministic: bool = False
    """On CUDA, take only operations that give the same bits in each run on the same devices and libraries; slower."""
    seed: Seed = 1234
    """Seed of the initial weights, of the order of the data and of dropout."""
    eval_interval: Count = 100
    """Steps between validations; 0 validates only at the end."""
    eval_steps: Count = 10
    """Global batches per validation; 0 disables validation."""
    eval_only: bool = False
    """Only measure the validation loss, and the test loss if there are such data, of checkpoint.load or else of the
    run's newest checkpoint: no step, no training state. Printed, and a line of evaluations.jsonl in
    logging.output_dir."""
    test_steps: Count | None = None
    """Global batches of the test after the last step, of data.test_data_path or of the test share of data.split; null
    means eval_steps where there is enough such data, 0 tests nothing."""

    @property
    def bf16(self) -> bool:
        """Whether weights and activations are bf16."""
        return self.dtype == "bf16"


@dataclass(frozen=True)
class OptimizerConfig(Section, name="optimizer"):
    """The optimizer and the learning-rate schedule."""

    name: Literal["adamw", "adamw8bit", "galore"] = "adamw"
    """adamw; adamw8bit: the moments of matrices take 8 bits per element; galore (arXiv 2403.03507): those of the
    layers' linear maps are of low rank, for variant full_rank."""
    lr: LearningRate = 1e-3
    """Peak learning rate."""
    lr_multipliers: LrMultipliers = field(default_factory=dict)
    """Factors of the learning rate (so of decoupled weight decay as well) of the embedding, of the linear maps of the
    first layer, of all A, all B and all beta; where two apply, their product. 0 freezes a part."""
    min_lr_ratio: Share = 0.1
    """Final learning rate as a share of the peak."""
    lr_decay_style: Literal["cosine", "cosine_restarts", "wsd", "constant"] = "cosine"
    """cosine; cosine_restarts: ReLoRA's jagged cosine, which drops to 0 every lr_restart_interval steps and comes back
    in lr_restart_warmup_steps; wsd: warm-up, stable, then a decay over lr_wsd_decay_steps; constant."""
    lr_warmup_steps: Count = 100
    """Steps of linear warm-up."""
    lr_restart_interval: PositiveCount | None = None
    """Steps between drops of cosine_restarts; null means relora.restart_interval."""
    lr_restart_warmup_steps: PositiveCount = 100
    """Steps of linear warm-up after each drop."""
    lr_wsd_decay_steps: PositiveCount | None = None
    """Steps of wsd's final decay; null means a tenth of train_steps."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """Shape of wsd's final decay."""
    adam_beta1: Probability = 0.9
    """Decay of the first moment."""
    adam_beta2: Probability = 0.95
    """Decay of the second moment."""
    adam_eps: Epsilon = 1e-8
    """Added to the root of the second moment."""
    galore_rank: RankSize = 128
    """galore: rank r of the projected gradients, at most the smaller side of every linear map."""
    update_proj_gap: PositiveCount = 200
    """galore: updates between two singular value decompositions of a gradient."""
    galore_scale: Annotated[float, Ge(SMALLEST), Le(1000)] = 0.25
    """galore: factor of the learning rate of the projected maps."""
    proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    """galore: which inner dimension of a map [m, n] is projected: std the shorter side's, reverse_std the longer
    side's, right n, left m, full both."""
    rotate_moments: bool = False
    """galore: express moments in the coordinates of a new projection. false, as the original: they stay numbers of the
    old ones."""
    weight_decay: Annotated[float, Ge(0), Le(1000)] = 0.1
    """Decoupled weight decay of matrices; beta and norm weights get none."""
    clip_grad: NonNegative = 1.0
    """Largest global gradient norm; 0 disables clipping."""


@dataclass(frozen=True)
class CheckpointConfig(Section, name="checkpoint"):
    """When and where checkpoints are saved."""

    dir: FilePath | None = None
    """Folder of the checkpoints; null means `checkpoints` inside logging.output_dir."""
    load: FilePath | None = None
    """Start a new run, at step 0, from the weights of another run or of an import: a step_ folder, a folder of them
    (its newest whole one) or a run's folder, written under any layout. A run that has a checkpoint of its own goes on
    from that."""
    load_optimizer: bool = False
    """With `load`: take over the moments and Adam's count of updates as well; false starts with moments of zero."""
    save_interval: Count = 0
    """Steps between checkpoints; 0 saves only at the end (and on a signal)."""
    save_interval_minutes: Annotated[float, Ge(0), Le(525600)] = 0.0
    """Save the first step that ends this many minutes after the last checkpoint, besides save_interval; 0: by steps
    alone."""
    keep_last: PositiveCount | None = None
    """Number of newest checkpoints to keep; older ones are removed when a new one is complete. null keeps all."""
    keep_every: PositiveCount | None = None
    """With keep_last: keep checkpoints of steps that are multiples of this as well."""


@dataclass(frozen=True)
class FaultsConfig(Section, name="faults"):
    """Bad steps: loss or gradient norm not finite, a loss spike, or no trained token in the batch."""

    on_bad_step: Literal["stop", "skip"] = "stop"
    """stop ends the run with status 3. skip leaves the weights unchanged, counts the step and goes on."""
    spike_deviations: Positive | None = None
    """A loss is a spike when it is this many standard deviations above the mean of the last spike_window good steps;
    null detects no spikes."""
    spike_window: Annotated[int, Ge(2), Le(10**6)] = 128
    """Good steps whose losses are compared; no spikes are detected before there are that many."""
    max_skips_in_a_row: Count = 10
    """Consecutive bad steps that are skipped; one more stops the run."""
    max_skips: Count = 100
    """Bad steps that are skipped in the whole run; one more stops it."""


@dataclass(frozen=True)
class LoggingConfig(Section, name="logging"):
    """Logs and outputs of a run."""

    output_dir: FilePath = "runs/default"
    """Folder of metrics.jsonl, config.yaml, TensorBoard files and loss.png."""
    log_interval: PositiveCount = 10
    """Steps between metric lines."""
    profile_steps: StepRange | None = None
    """[first, last]: of these steps of rank 0, write a PyTorch profiler trace, time by kind of kernel and, on CUDA, a
    memory snapshot into `profile/` of output_dir (docs/train.md); null profiles nothing."""
    wandb_project: Name | None = None
    """Weights & Biases project; null disables it."""
    sample_prompt: Text | None = None
    """Prompt of a sample that is printed at the end of training; null prints none."""
    sample_tokens: Annotated[int, Ge(0), Le(2**20)] = 64
    """Tokens of that sample."""


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    relora: ReloraConfig = field(default_factory=ReloraConfig)
    rank_schedule: RankScheduleConfig = field(default_factory=RankScheduleConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's JSON; keys that the other sections decide are refused."""

    def __post_init__(self) -> None:
        """Check the rules between fields; each section has checked its own."""
        for entry in fields(self):
            section, kind = getattr(self, entry.name), entry.default_factory
            require(
                not isinstance(kind, type) or isinstance(section, kind),
                f"{entry.name} is {shown(section)}, but must be a mapping of its fields: correct it, or leave it out",
            )
        object.__setattr__(self, "deepspeed", checked_deepspeed(self.deepspeed))
        check_config(self)
        check_deepspeed(self)
