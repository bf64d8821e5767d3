"""Rules between the fields of a configuration.

The `deepspeed` section is in `config/deepspeed.py`; checks that need the number of ranks are in `config/batch.py`,
those of files and tokenizer in `data/indexed.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_crnet.config.architectures import ARCHITECTURES
from megatron_crnet.config.cuda_graphs import check_cuda_graphs
from megatron_crnet.config.experts_rules import check_expert_parallel, check_experts
from megatron_crnet.config.field_types import MOST, shown
from megatron_crnet.config.optimizer_rules import check_optimizer, check_restarts, wsd_decay_steps
from megatron_crnet.config.positions import METHODS, head_width, position_table
from megatron_crnet.config.rank_rules import check_rank_schedule
from megatron_crnet.utils.errors import ConfigError, multiples_near, require

if TYPE_CHECKING:
    from megatron_crnet.config.parallel_section import ParallelConfig
    from megatron_crnet.config.schema import Config, ModelConfig

MOST_PROFILED = 100
"""Steps; each keeps its thousands of operations in the host's memory until all are written."""


def check_config(config: Config) -> None:
    """Check all rules but those of `deepspeed`; each may rely on those before it.

    Raises:
        ConfigError: for the first rule that is broken.
    """
    _check_unread(config)
    _check_model(config.model)
    _check_data(config)
    _check_training(config)
    _check_ramp(config)
    check_optimizer(config)
    _check_relora(config)
    check_rank_schedule(config)
    check_restarts(config)
    _check_parallel(config)
    check_expert_parallel(config)
    _check_pipeline(config)
    _check_kept_tensors(config)
    check_cuda_graphs(config)
    _check_profile(config)


def _check_unread(config: Config) -> None:
    """Nothing is set that this run does not read."""
    for is_read, section, names, why in _conditions(config):
        changed = () if is_read else getattr(config, section).changed()
        for name in [name for name in changed if not names or name in names]:
            value = shown(getattr(getattr(config, section), name))
            raise ConfigError(f"{section}.{name} is {value}, but {why}, so that nothing reads it: leave it out")


def _conditions(config: Config) -> Iterator[tuple[bool, str, Sequence[str], str]]:
    """Whether fields of a section (none named: all) are read, and why they would not be."""
    model, relora, recompute, checkpoint = config.model, config.relora, config.recompute, config.checkpoint
    architecture = ARCHITECTURES[model.architecture]
    is_named = f"model.architecture is {model.architecture}"
    has_experts, without = architecture.experts is not None, f"{is_named}, which has no experts (qwen3_moe has)"
    of_experts = [name for name in vars(model) if name.endswith("_experts") or name.startswith("moe_")]
    yield has_experts, "model", of_experts, without
    yield has_experts, "parallel", ("expert_model_parallel_size", "moe_token_dispatcher_type"), without
    yield architecture.is_rotary, "model", ("rotary_base", "rope_scaling_factor"), f"{is_named}, which rotates nothing"
    of_documents = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
    yield config.data.sample_format == "packed", "data", of_documents, "data.sample_format is padded"
    yield config.distillation.teacher is not None, "distillation", (), "distillation.teacher is not set"
    yield METHODS[model.variant].has_frozen, "relora", (), f"model.variant is {model.variant}"
    of_restarts = ("prune", "prune_share")
    yield relora.restart_interval is not None, "relora", of_restarts, "relora.restart_interval is not set"
    yield relora.prune != "reset", "relora", ("prune_share",), "relora.prune reset zeroes all moments"
    yield relora.warm_start_steps > 0, "relora", ("warm_start_lr",), "relora.warm_start_steps is 0"
    strategy = f"recompute.strategy is {recompute.strategy}"
    yield recompute.traits.inverts, "recompute", ("inverse_tolerance",), f"{strategy}, not inverse"
    yield recompute.traits.saves_z, "recompute", ("keep_attention_output",), f"{strategy}, not replay or inverse"
    yield checkpoint.load is not None, "checkpoint", ("load_optimizer",), "checkpoint.load is not set"
    yield checkpoint.keep_last is not None, "checkpoint", ("keep_every",), "checkpoint.keep_last keeps all of them"


def _check_model(model: ModelConfig) -> None:
    """Heads and ranks fit the model's widths and layers."""
    h, heads, architecture = model.hidden_size, model.num_attention_heads, ARCHITECTURES[model.architecture]
    require(
        model.kv_channels is not None or h % heads == 0,
        f"model.hidden_size {h} does not divide by model.num_attention_heads {heads}: "
        f"use hidden_size {multiples_near(h, heads)}, or set kv_channels",
    )
    width = head_width(model)
    source = f"hidden_size {h} / num_attention_heads {heads}" if model.kv_channels is None else "kv_channels"
    require(
        not architecture.is_rotary or width % 2 == 0,
        f"model.{source} gives heads of width {width}, but rotary embeddings need an even width: change it",
    )
    require(
        architecture.is_rotary or model.max_position_embeddings is not None,
        f"model.max_position_embeddings is not set, but architecture {model.architecture} learns a vector for each "
        "position: set it to the longest sequence of the model",
    )
    groups = model.num_query_groups or heads
    require(
        heads % groups == 0,
        f"model.num_attention_heads {heads} does not divide by model.num_query_groups {groups}: use a divisor of "
        f"{heads}",
    )
    check_experts(model)
    position_table(model)


def _check_data(config: Config) -> None:
    """Options on documents fit the format of samples."""
    data = config.data
    require(
        data.reset_attention_mask or not data.reset_position_ids,
        "data.reset_position_ids is true without data.reset_attention_mask, so attention would reach into earlier "
        "documents over positions that run backwards: set both or neither",
    )


def _check_training(config: Config) -> None:
    """Lengths and the number of samples that indices can count."""
    training = config.training
    for name in ("train_steps", "eval_steps", "test_steps"):
        steps = getattr(training, name) or 0
        samples = steps * training.global_batch_size
        require(
            samples <= MOST,
            f"training.{name} {steps} x global_batch_size {training.global_batch_size} is {samples} samples, but the "
            f"index of a data set holds at most {MOST}: lower one of the two",
        )
    limit = config.model.max_position_embeddings
    require(
        limit is None or limit >= training.seq_length,
        f"model.max_position_embeddings {limit} is below training.seq_length {training.seq_length}: "
        "raise the first or lower the second",
    )


def _check_ramp(config: Config) -> None:
    """A ramp of the batch size ends at the global batch size."""
    training = config.training
    ramp, full = training.rampup_batch_size, training.global_batch_size
    if ramp is None:
        return
    shown = f"training.rampup_batch_size {ramp}"
    require(len(ramp) == 3, f"{shown} has {len(ramp)} numbers: give [start, increment, samples]")
    start, increment, _ = ramp
    require(start <= full, f"{shown} starts above training.global_batch_size {full}: lower the first number")
    require(
        (full - start) % increment == 0,
        f"{shown} does not reach training.global_batch_size {full} from {start} in steps of {increment}: use an "
        f"increment that divides {full - start}",
    )


def _check_relora(config: Config) -> None:
    """The section relora is that of a model that has restarts, and they fit the run."""
    relora, model, optimizer = config.relora, config.model, config.optimizer
    if not METHODS[model.variant].has_frozen:
        return
    require(
        position_table(model).has_low_rank,
        f"model.full_rank_layers names all {model.num_layers} layers, so that relora has no factors: leave some out",
    )
    warm, steps = relora.warm_start_steps, config.training.train_steps
    require(
        warm + optimizer.lr_warmup_steps < steps,
        f"relora.warm_start_steps {warm} and optimizer.lr_warmup_steps {optimizer.lr_warmup_steps}, with which the "
        f"schedule begins anew after them, leave none of training.train_steps {steps}: lower them or train longer",
    )
    decay = wsd_decay_steps(optimizer, steps - warm) if optimizer.lr_decay_style == "wsd" else 0
    require(
        warm == 0 or warm + optimizer.lr_warmup_steps + decay <= steps,
        f"relora.warm_start_steps {warm}, optimizer.lr_warmup_steps {optimizer.lr_warmup_steps} and "
        f"lr_wsd_decay_steps {decay} are more than training.train_steps {steps} together: lower them or train longer",
    )
    require(
        relora.restart_interval is None or relora.restart_interval < steps - warm,
        f"relora.restart_interval {relora.restart_interval} is not below the {steps - warm} steps after the warm "
        "start, so nothing would restart: lower it, or leave it out",
    )
    require(
        warm == 0 or config.training.rampup_batch_size is None,
        f"relora.warm_start_steps {warm} with training.rampup_batch_size: the schedule would begin anew in the middle "
        "of the ramp: leave one of the two out",
    )


def _check_parallel(config: Config) -> None:
    """Widths divide by the tensor-parallel size, layers by the pipeline's."""
    parallel, model = config.parallel, config.model
    tp, pp, vpp = parallel.sizes
    groups = model.num_query_groups or model.num_attention_heads
    for section, name, value in (
        ("model", "num_attention_heads", model.num_attention_heads),
        ("model", "num_query_groups", groups),
        ("training", "seq_length", config.training.seq_length),
    ):
        require(
            value % tp == 0 or (name == "seq_length" and not parallel.shards_sequence),
            f"{section}.{name} {value} does not divide by parallel.tensor_model_parallel_size {tp}: "
            f"use {multiples_near(value, tp)}, or another tensor-parallel size",
        )
    _check_cut("vocab_size", model.vocab_size, parallel)
    if ARCHITECTURES[model.architecture].experts is None:
        _check_cut("ffn_hidden_size", model.ffn_hidden_size, parallel)
    require(
        not (parallel.sequence_parallel and tp == 1),
        "parallel.sequence_parallel is true with tensor_model_parallel_size 1, but one rank "
        "has no sequence to shard: leave it out or raise tensor_model_parallel_size",
    )
    require(
        vpp == 1 or pp > 1,
        f"parallel.virtual_pipeline_model_parallel_size {vpp} needs pipeline_model_parallel_size above 1, "
        f"not {pp}: raise the second or leave the first out",
    )


def _check_cut(name: str, width: int, parallel: ParallelConfig) -> None:
    """A width can be cut over tensor-parallel ranks."""
    tp = parallel.tensor_model_parallel_size
    require(
        parallel.pad_widths_to > 1 or width % tp == 0,
        f"model.{name} {width} does not divide by parallel.tensor_model_parallel_size {tp}, and "
        "parallel.pad_widths_to 1 does not pad it: use pad_widths_to 64, or another tensor-parallel size",
    )
    require(
        -(-width // tp) * (tp - 1) < width,
        f"model.{name} {width} cannot be cut into {tp} equal parts, as parallel.tensor_model_parallel_size "
        f"asks, of which padding leaves none empty: use {-(-width // tp) * tp}, or another tensor-parallel size",
    )


def _check_pipeline(config: Config) -> None:
    """Layers can be spread over stages and virtual stages as asked."""
    parallel, layers = config.parallel, config.model.num_layers
    _, pp, vpp = parallel.sizes
    uneven = {
        name: value
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        if (value := getattr(parallel, name)) is not None
    }
    for name, value in uneven.items():
        require(pp > 1, f"parallel.{name} {value} needs pipeline_model_parallel_size above 1, not {pp}: leave it out")
        require(
            value % vpp == 0,
            f"parallel.{name} {value} does not divide by virtual_pipeline_model_parallel_size {vpp}: use "
            f"{multiples_near(value, vpp)}",
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
    verb, name = "change" if uneven else "set", next(iter(uneven), "num_layers_in_first_pipeline_stage")
    can_be_uneven = layers % vpp == 0 and layers >= pp * vpp  # then a first stage of some size leaves a multiple
    require(
        rest > 0 and rest % unit == 0,
        f"model.num_layers {layers} leaves {rest} layers for {stages} pipeline stages of {vpp} virtual ones: use "
        f"{layers - rest + max(rest // unit, 1) * unit} or {layers - rest + max(rest // unit + 1, 2) * unit} layers"
        f"{f', or {verb} parallel.{name}' if can_be_uneven else ''}",
    )


def _check_kept_tensors(config: Config) -> None:
    """Where kept tensors live: `recompute` and DeepSpeed's `activation_checkpointing` belong together."""
    name = "deepspeed.activation_checkpointing"
    section = config.deepspeed.get("activation_checkpointing", {})
    asked = [key for key, value in section.items() if value]
    contiguous = section.get("contiguous_memory_optimization", False)
    require(
        not asked or config.recompute.traits.recomputes,
        f"{name}.{asked[0] if asked else ''} is set, but recompute.strategy {config.recompute.strategy} keeps "
        "nothing there: set recompute.strategy replay, inverse or full, or leave the key out",
    )
    require(
        not contiguous or section.get("partition_activations", False),
        f"{name}.contiguous_memory_optimization needs partition_activations in DeepSpeed: set both",
    )
    require(
        not contiguous or section.get("number_checkpoints", 0) > 0,
        f"{name}.contiguous_memory_optimization needs number_checkpoints above 0, not "
        f"{section.get('number_checkpoints')}: give the number of segments of a pipeline stage",
    )
    require(
        not (contiguous and config.recompute.keep_attention_output and config.data.reset_attention_mask),
        f"{name}.contiguous_memory_optimization with recompute.keep_attention_output would need buffers for every "
        "length that a document can have under data.reset_attention_mask: leave one of the three out",
    )
    require(
        contiguous or "number_checkpoints" not in section,
        f"{name}.number_checkpoints {section.get('number_checkpoints')} is the size of the buffers of "
        "contiguous_memory_optimization, which is off: leave it out or switch that on",
    )


def _check_profile(config: Config) -> None:
    """The steps that are profiled are steps of the run, and few."""
    steps, train_steps = config.logging.profile_steps, config.training.train_steps
    if steps is None:
        return
    shown = f"logging.profile_steps {steps}"
    require(len(steps) == 2, f"{shown} has {len(steps)} numbers, but must have two: give [first, last]")
    first, last = steps
    require(first <= last, f"{shown} ends before it begins: write {[last, first]}")
    require(
        last <= train_steps,
        f"{shown} is outside the run, which has training.train_steps {train_steps}: name steps from 1 to {train_steps}",
    )
    require(
        last - first < MOST_PROFILED,
        f"{shown} is {last - first + 1} steps, but at most {MOST_PROFILED} can be profiled: write "
        f"{[first, first + MOST_PROFILED - 1]}, or fewer",
    )
