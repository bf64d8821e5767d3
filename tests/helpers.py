"""Small models, batches and the plain training loop that everything is compared with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from megatron.core import parallel_state
from torch import Tensor

from megatron_crnet.config.batch import plan_batches
from megatron_crnet.config.distillation_section import DistillationConfig
from megatron_crnet.config.megatron import build_transformer_config
from megatron_crnet.config.schema import (
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ReloraConfig,
    TrainingConfig,
)
from megatron_crnet.data.documents import DOCUMENT_LENGTHS, document_lengths
from megatron_crnet.distributed.process_groups import initialize_parallel
from megatron_crnet.engine.distillation import build_teacher, teacher_config
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.engine.expert_load import load_metrics, routing_totals
from megatron_crnet.engine.state_kinds import MASTER
from megatron_crnet.engine.zero import local_shape
from megatron_crnet.model.gpt import CRNetModel, build_model_chunks
from megatron_crnet.model.reference import MixtureOfExperts, ReferenceCRNet
from megatron_crnet.model.reference_distillation import distillation_losses, features_and_logits
from megatron_crnet.model.weights import Weight, by_parameter, canonical_weights, initial_value
from megatron_crnet.planning.shards import build_local_models
from tests.plain_training import plain_optimizer, restart_reference

EOD = 0
"""The token that ends documents."""

TINY_MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "rank": 8,
    "beta_init": 0.9,
    "init_method_std": 0.1,  # large enough that attention is not uniform and no gradient is all rounding
}

PADDED: dict[str, Any] = {
    "ffn_hidden_size": 125,
    "rank": {"q": 31, "k": 31, "v": 8, "o": 31, "gate": 31, "up": 30, "down": 31},
}
"""Widths and ranks that are padded on one, two and four tensor-parallel ranks, beside some that are not."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"architecture": "gpt2", "max_position_embeddings": 16},
    "qwen3": {"architecture": "qwen3", "kv_channels": 6, "num_query_groups": 2, "tie_word_embeddings": True},
    "qwen3_moe": {
        **{"architecture": "qwen3_moe", "num_query_groups": 2, "ffn_hidden_size": 20},
        **{"num_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.05, "moe_z_loss_coeff": 0.01},
    },
}
"""Architectures beside LLaMA, with what makes each different: tied output layers, heads of a width of their own."""
FULL_RANK_EXPERTS = {**ARCHITECTURES["qwen3_moe"], "full_rank_experts": True}
PADDED_GROUPED = {**PADDED, "num_query_groups": 2, "rank": {**PADDED["rank"], "k": 15}}
PADDED_MOE = {**ARCHITECTURES["qwen3_moe"], **PADDED_GROUPED}
PADDED_QWEN3 = {
    **{**ARCHITECTURES["qwen3"], **PADDED},
    "rank": {**PADDED["rank"], "q": 23, "k": 11, "o": 23},
}
PADDED_GPT2 = {
    **{**ARCHITECTURES["gpt2"], **PADDED, "vocab_size": 61},
    "rank": {p: r for p, r in PADDED["rank"].items() if p != "gate"},
}


def tiny_config(
    model: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    deepspeed_section: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    logging: dict[str, Any] | None = None,
    relora: dict[str, Any] | None = None,
    distillation: dict[str, Any] | None = None,
) -> Config:
    """A configuration that trains in milliseconds.

    Clipping is active and eps is not negligible, so a wrong norm or scale of the gradients changes the weights.
    """
    return Config(
        model=ModelConfig(**{**TINY_MODEL, **(model or {})}),
        parallel=ParallelConfig(**(parallel or {})),
        training=TrainingConfig(
            **{"seq_length": 16, "micro_batch_size": 2, "global_batch_size": 8, **(training or {})}
        ),
        optimizer=OptimizerConfig(
            **{"lr": 3e-3, "lr_warmup_steps": 2, "clip_grad": 0.5, "adam_eps": 1e-4, **(optimizer or {})}
        ),
        deepspeed=deepspeed_section or {},
        relora=ReloraConfig(**(relora or {})),
        distillation=DistillationConfig(**(distillation or {})),
        data=DataConfig(**(data or {})),
        logging=LoggingConfig(**(logging or {})),
    )


def random_tokens(config: Config, step: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and labels of a global batch, [global batch, s] each, the same on every rank.

    Where the data section says something of documents, they end with EOD, one row is one and one has only empty ones.
    """
    generator = torch.Generator().manual_seed(step)
    shape = (config.training.global_batch_size, config.training.seq_length + 1)
    text = torch.randint(config.model.vocab_size, shape, generator=generator)
    if config.data.reset_attention_mask or config.data.eod_mask_loss:
        text[torch.rand(shape, generator=generator) < 0.25] = EOD
        text[1].clamp_(min=EOD + 1)
        text[2] = EOD
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def random_mask(config: Config, step: int = 0) -> Tensor:
    """1 for trained tokens, [global batch, s], the same on every rank.

    The share differs from sequence to sequence, so that a mean over ranks or micro-batches is not the mean over tokens.
    """
    generator = torch.Generator().manual_seed(step + 1000)
    count, length = config.training.global_batch_size, config.training.seq_length
    share = torch.rand(count, 1, generator=generator)
    mask = (torch.rand(count, length, generator=generator) < share).float()
    mask[:, 0] = 1.0  # no sequence is without any
    return mask * (random_tokens(config, step)[0] != EOD) if config.data.eod_mask_loss else mask


def make_batch(
    tokens: Tensor, labels: Tensor, mask: Tensor | None = None, data: DataConfig | None = None
) -> dict[str, Tensor]:
    """One micro-batch as the data pipeline gives it; all tokens are trained without a mask."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
    mask = torch.ones(tokens.shape) if mask is None else mask
    batch = {"tokens": tokens, "labels": labels, "position_ids": positions, "loss_mask": mask}
    if data is not None and data.reset_attention_mask:
        lengths = batch[DOCUMENT_LENGTHS] = torch.cat([document_lengths(row, EOD) for row in tokens])
        if data.reset_position_ids:
            batch["position_ids"] = positions_within(lengths).view_as(tokens)
    return batch


def document_numbers(config: Config, tokens: Tensor) -> Tensor | None:
    """Number of every token's document in its row; None where attention reaches over whole rows."""
    ends = (tokens == EOD).long()
    return ends.cumsum(1) - ends if config.data.reset_attention_mask else None


def micro_batches(config: Config, dp_rank: int, world_size: int, step: int = 0) -> list[dict[str, Tensor]]:
    """This rank's part of the global batch."""
    plan, (tokens, labels), mask = (
        plan_batches(config, world_size),
        random_tokens(config, step),
        random_mask(config, step),
    )
    size = plan.micro_batch_size
    starts = [(m * plan.dp_size + dp_rank) * size for m in range(plan.num_microbatches)]
    return [make_batch(*(whole[i : i + size] for whole in (tokens, labels, mask)), config.data) for i in starts]


def masked_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy over the trained tokens of the whole global batch."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum() / mask.sum()


def plain_losses(
    reference: ReferenceCRNet, teacher: ReferenceCRNet | None, config: Config, step: int
) -> dict[str, Tensor]:
    """The losses of the whole global batch by name: `loss`, and with a teacher those of distillation whose weight is
    not 0."""
    (tokens, labels), mask = random_tokens(config, step), random_mask(config, step)
    positions = make_batch(tokens, labels, mask, config.data)["position_ids"]
    inputs = tokens, document_numbers(config, tokens), positions
    if teacher is None:
        return {"loss": masked_loss(reference(*inputs), labels, mask)}
    features, logits = features_and_logits(reference, *inputs)
    with torch.no_grad():
        taught = features_and_logits(teacher, *inputs)
    of_features, of_logits = distillation_losses((features, logits), taught, mask)
    found = {"loss": masked_loss(logits, labels, mask), "feature_loss": of_features, "logit_loss": of_logits}
    return {name: loss for name, loss in found.items() if loss_weights(config)[name]}


def loss_weights(config: Config) -> dict[str, float]:
    """What each of `plain_losses` counts in the gradient."""
    return {"loss": 1.0, "feature_loss": config.distillation.kd_alpha, "logit_loss": config.distillation.kd_beta}


def check_routing(reference: ReferenceCRNet, engine: TrainEngine) -> None:
    """Tokens of each expert, and the losses of routers, are the reference's; a collective call."""
    totals, model = routing_totals(engine.chunks, engine.context.device), engine.config.model
    auxiliary = reference.auxiliary_loss(engine.config.training.micro_batch_size)
    for counted, mixture in zip(totals, mixtures_of(reference), strict=True):
        expected = mixture.chosen.flatten().bincount(minlength=len(counted) - 1)
        assert torch.equal(counted[:-1], expected.double())
    z = sum(mixture.logits.logsumexp(-1).square().mean() for mixture in mixtures_of(reference))
    load = load_metrics(totals, engine.config).get("load_balancing_loss", 0.0) * model.num_layers
    assert math.isclose(load * model.moe_aux_loss_coeff + z * model.moe_z_loss_coeff, auxiliary, rel_tol=1e-5)


def mixtures_of(reference: ReferenceCRNet) -> list[MixtureOfExperts]:
    return [module for module in reference.modules() if isinstance(module, MixtureOfExperts)]


def reference_model(config: Config, transformer_config: Any) -> ReferenceCRNet:
    """The plain model in fp64, with the initial weights that every layout draws."""
    reference = ReferenceCRNet(config.model)
    seed = config.training.seed
    values = {n: initial_value(n, tuple(v.shape), transformer_config, seed) for n, v in reference.state_dict().items()}
    reference.load_state_dict(values)
    return reference.double()


def random_teacher(config: Config) -> tuple[ReferenceCRNet | None, list[CRNetModel] | None]:
    """A teacher with weights of its own, plain and in this rank's layout; None where the configuration has none."""
    if config.distillation.teacher is None:
        return None, None
    dense = teacher_config(config)
    plain, generator = reference_model(dense, build_transformer_config(dense)), torch.Generator().manual_seed(99)
    with torch.no_grad():
        for weight in plain.parameters():  # another model than a full-rank one that it teaches
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    weights = plain.state_dict()
    return plain, build_teacher(config, lambda weight: weights[weight.name])


@dataclass(frozen=True)
class Errors:
    """Largest relative differences from the plain reference over all steps, weights and ranks."""

    loss: float
    grad_norm: float
    gradients: float
    parameters: float

    def worst(self) -> float:
        return max(dataclasses.astuple(self))


def positions_within(lengths: Tensor) -> Tensor:
    """Positions that restart with each document, [sum of lengths]."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)


def relative_error(pairs: Iterable[tuple[str, Tensor, Tensor, Tensor]]) -> float:
    """Largest |ours - reference| / |whole reference weight| over weights.

    Args:
        pairs: name, ours, reference's shard, reference's whole weight. All betas count as one vector, because
            the gradient of a single one is a sum that may cancel to almost nothing. So do all biases: softmax does
            not see that of the keys, whose gradient is 0.
    """
    difference: dict[str, float] = {}
    scale: dict[str, float] = {}
    for name, ours, shard, whole in pairs:
        key = next((kind for kind in ("beta", "_proj.bias") if name.endswith(kind)), name)
        difference[key] = difference.get(key, 0.0) + float((ours.double() - shard).square().sum())
        scale[key] = scale.get(key, 0.0) + float(whole.double().square().sum())
    return max((difference[key] ** 0.5 / max(scale[key] ** 0.5, 1e-30) for key in difference), default=0.0)


def local_weights(engine: TrainEngine) -> list[Weight]:
    return [weight for chunk in engine.chunks for weight in canonical_weights(chunk)]


def gradient_of(engine: TrainEngine, weight: Weight) -> Tensor:
    """This rank's shard of a gradient after `forward_backward`, in whatever place DeepSpeed keeps it."""
    parameter = weight.parameter
    whole = parameter.grad if engine.stage == 0 else safe_get_full_grad(parameter)
    assert whole is not None, weight.name
    return weight.local(whole.view(local_shape(parameter)))


def master_of(engine: TrainEngine, weight: Weight) -> Tensor:
    """This rank's shard of the fp32 weight that the optimizer updates."""
    parameter = weight.parameter
    if not parameter.requires_grad:
        frozen = engine.zero.read(parameter, MASTER)
        assert frozen is not None
        return weight.local(frozen)
    if engine.stage == 0:
        groups = zip(*(getattr(engine.optimizer, f"fp{bits}_groups", []) for bits in (16, 32)), strict=True)
        masters = {low: high for pair in groups for low, high in zip(*pair, strict=True)}
        return weight.local(masters.get(parameter, parameter).detach())
    whole = safe_get_full_fp32_param(parameter)
    return weight.local(whole.view(local_shape(parameter)))


def largest_padding(engine: TrainEngine) -> float:
    """Largest value of masters and moments that belongs to no canonical weight; a collective call."""
    found = 0.0
    for parameter, weights in by_parameter(local_weights(engine)).items():
        for kind in engine.zero.kinds_of(parameter):
            values = engine.zero.read(parameter, kind)
            assert values is not None
            for weight in weights:
                weight.local(values).zero_()
            found = max(found, float(values.abs().max()))
    return found


def compare_with_reference(config: Config, steps: int = 3) -> Errors:
    """Train `steps` steps on this world's ranks beside the plain reference; a collective call.

    The reference is one fp64 model on the whole global batch with plain autograd, clipping and AdamW.
    """
    context = initialize_parallel(config)
    plain_teacher, teacher = random_teacher(config)
    engine = TrainEngine(config, build_model_chunks(config), context, teacher)
    if engine.stage < 3:
        here = [p for chunk in engine.chunks for p in chunk.parameters()]
        local = build_local_models(config)[parallel_state.get_pipeline_model_parallel_rank()]
        assert sum(p.numel() for p in here if p.requires_grad) == local.numel
        assert sum(p.numel() for p in here if not p.requires_grad) == local.frozen_numel
    reference = reference_model(config, engine.chunks[0].config)
    named = dict(reference.named_parameters())
    optimizer = plain_optimizer(named, config)
    errors = torch.zeros(4, dtype=torch.float64)
    for step in range(steps):
        batches = micro_batches(config, context.dp_rank, context.world_size, step)
        loss = engine.forward_backward(batches, int(random_mask(config, step).sum()))
        plain = plain_losses(reference, plain_teacher, config, step)
        if config.model.num_experts:
            check_routing(reference, engine)
        optimizer.zero_grad()
        total = torch.stack([loss_weights(config)[name] * value for name, value in plain.items()]).sum()
        (total + reference.auxiliary_loss(config.training.micro_batch_size)).backward()
        whole = {name: parameter.grad.clone() for name, parameter in named.items() if parameter.requires_grad}
        gradients = relative_error(
            (w.name, gradient_of(engine, w), w.shard(whole[w.name]), whole[w.name])
            for w in local_weights(engine)
            if w.name in whole
        )
        plain_norm = torch.nn.utils.clip_grad_norm_(named.values(), config.optimizer.clip_grad or float("inf"))
        grad_norm, lr = engine.update()
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr * param_group["lr_mult"]
        optimizer.step()
        engine.restart_if_due()
        if (interval := config.relora.restart_interval) and (step + 1) % interval == 0:
            restart_reference(reference, optimizer, config, engine.chunks[0].config, (step + 1) // interval)
        parameters = relative_error(
            (w.name, master_of(engine, w), w.shard(named[w.name]).detach(), named[w.name])
            for w in local_weights(engine)
            # biases begin at 0 and are nothing but updates, which differ as gradients do in bf16
            if not (config.training.bf16 and w.name.endswith("bias"))
        )
        ours = {"loss": loss, **engine.distillation_losses}
        assert ours.keys() == plain.keys()
        losses = max(abs(ours[name] / float(value) - 1) for name, value in plain.items())
        found = [losses, abs(grad_norm / float(plain_norm) - 1), gradients, parameters]
        errors = torch.maximum(errors, torch.tensor(found, dtype=torch.float64))
    if config.model.ffn_hidden_size == PADDED["ffn_hidden_size"]:
        assert engine.chunks[0].config.table.padding() or config.parallel.pad_widths_to == 1
        assert largest_padding(engine) == 0.0
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    engine.close()
    context.heartbeat.close()
    return Errors(*errors.tolist())
