"""Layers and parameters of one rank, as `model/gpt.py` builds them, from the configuration alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_crnet.config.architectures import Group
from megatron_crnet.config.architectures.base import NORMS, QK_NORMS
from megatron_crnet.config.deepspeed import reduce_bucket_size, zero_option, zero_stage
from megatron_crnet.config.experts_rules import spans_replicas
from megatron_crnet.config.megatron import CRNetTransformerConfig, build_transformer_config
from megatron_crnet.config.schema import Config
from megatron_crnet.engine.distillation import teacher_config
from megatron_crnet.model.stacked import ALIGNMENT
from megatron_crnet.recompute.planner import initial_segments, plan_inverse_segments

PROJECTED = "projected"
"""Kind of the linear maps that GaLore projects."""
SPREAD = "spread"
"""Kind of the experts that are spread over replicas."""


@dataclass(frozen=True)
class Chunk:
    """A model chunk: consecutive layers on one rank.

    Attributes:
        layers: numbers from 0 over the whole model.
        embeds: has the embedding.
        predicts: has the final norm, the output layer and the loss.
        segments: layers that are recomputed together; empty without recomputation.
    """

    layers: range
    embeds: bool
    predicts: bool
    segments: list[range]


@dataclass(frozen=True)
class LocalParameter:
    """A parameter tensor of a rank.

    Attributes:
        layer: -1 for the embedding, num_layers for final norm and output layer.
        numel: elements on this rank.
        kind: matrix, `PROJECTED`, `SPREAD`, norm (or bias) or beta, which are separate parameter groups in bf16.
        is_partial: its gradient is a partial sum over tensor-parallel ranks.
        is_frozen: it is not trained.
        is_expert: of experts or their router.
    """

    layer: int
    numel: int
    is_partial: bool = False
    kind: str = "matrix"
    is_frozen: bool = False
    is_expert: bool = False


@dataclass(frozen=True, eq=False)  # hashed by identity
class LocalModel:
    """The model of every rank of pipeline stage `pp_rank`.

    Attributes:
        weights: tensors of this rank; `parameters` are those that are trained.
        tp, pp: tensor- and pipeline-parallel sizes.
        stage: ZeRO stage.
        element: bytes of a weight and of an activation.
        tokens: per micro-batch; `local_tokens` are those of this rank under sequence parallelism.
        teacher: what the rank holds of it (`distillation`); None without one. Nothing of it is trained.
    """

    config: Config
    transformer: CRNetTransformerConfig
    pp_rank: int
    chunks: list[Chunk]
    weights: list[LocalParameter]
    tp: int
    pp: int
    stage: int
    element: int
    tokens: int
    local_tokens: int
    teacher: LocalModel | None = None

    @property
    def bf16(self) -> bool:
        """Whether weights and activations are bf16."""
        return self.element == 2

    @cached_property
    def parameters(self) -> list[LocalParameter]:
        """Tensors with gradients and optimizer state."""
        return [p for p in self.weights if not p.is_frozen]

    @cached_property
    def frozen_numel(self) -> int:
        """Elements of weights that are not trained."""
        return sum(p.numel for p in self.weights if p.is_frozen)

    @property
    def embedding(self) -> int:
        """Elements of the embedding, and of the output layer, on a rank that has them."""
        return _embedding(self.transformer)

    @cached_property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(p.numel for p in self.parameters)

    def elements(self, *kinds: str) -> int:
        """Elements of the parameters of these kinds."""
        return sum(p.numel for p in self.parameters if p.kind in kinds)

    @property
    def spread(self) -> int:
        """Replicas over which the experts of a layer are spread."""
        return max(self.transformer.expert_model_parallel_size // self.tp, 1)

    def padded(self, dp_size: int) -> int:
        """Elements with DeepSpeed's padding for even shards of groups, or of tensors at ZeRO-3."""
        return sum(self.padded_groups(dp_size).values())

    def padded_groups(self, dp_size: int) -> dict[str, int]:
        """The same by kind."""
        if self.stage == 3:
            return {"all": sum(-(-p.numel // dp_size) * dp_size for p in self.parameters)}
        groups = Counter[str]()
        for p in self.parameters:
            groups[p.kind if self.bf16 or p.kind in ("matrix", PROJECTED, SPREAD) else "norm"] += p.numel
        if self.stage == 0:
            return groups
        units = {kind: 2 * self.replicas(kind, dp_size) for kind in groups}
        return {kind: -(-numel // units[kind]) * units[kind] for kind, numel in groups.items()}

    def replicas(self, kind: str, dp_size: int) -> int:
        """Copies of the parameters of a kind, over which ZeRO partitions."""
        return dp_size // self.spread if kind == SPREAD else dp_size

    def partition(self, dp_size: int) -> float:
        """Elements of which one rank keeps the optimizer's state."""
        return sum(numel / self.replicas(kind, dp_size) for kind, numel in self.padded_groups(dp_size).items())

    @cached_property
    def partial_numel(self) -> int:
        """Elements whose gradients are partial sums over tensor-parallel ranks."""
        return sum(p.numel for p in self.parameters if p.is_partial)

    def partial_bytes(self, dp_size: int) -> float:
        """Bytes of them that a rank sums; with ZeRO 2 and 3 they are sharded over replicas already."""
        return self.partial_numel * (2 if self.bf16 and self.stage == 0 else 4) / (dp_size if self.stage >= 2 else 1)

    @cached_property
    def bucket(self) -> int:
        """Elements of gradients that are reduced together."""
        return reduce_bucket_size(self.config, self.numel)

    @property
    def buffer(self) -> int:
        """Elements of the buffer to which they are copied before."""
        return self.bucket if zero_option(self.config, "contiguous_gradients", True) else 0


@dataclass(frozen=True)
class StackedWeight:
    """One matrix of an expert, as a product of stacks takes it.

    Attributes:
        elements: of the matrix with both sides in whole units of 16 bytes.
        is_copied: whether it must be copied for that.
    """

    elements: int
    is_copied: bool

    @classmethod
    def of(cls, h_in: int, h_out: int, element: int) -> StackedWeight:
        """Of a matrix [h_out, h_in] of `element` bytes each."""
        unit = ALIGNMENT // element
        rows, columns = (-(-side // unit) * unit for side in (h_out, h_in))
        return cls(rows * columns, (rows, columns) != (h_out, h_in))


def expert_weights(model: LocalModel, layer: int) -> tuple[list[StackedWeight], list[StackedWeight]]:
    """Matrices of an expert in a layer with experts: of full rank, and factors; a layer has either, or frozen ones of
    full rank beside factors."""
    table, size = model.transformer.table, model.element
    experts, ranks = table.architecture.experts, table.padded_ranks[layer]
    assert experts is not None
    dense, factors = list[StackedWeight](), list[StackedWeight]()
    for group in experts.groups:
        widths, low = [table.shapes[name][1] for name in group.names], [ranks[name] for name in group.names]
        h_in = table.shapes[group.names[0]][0]
        dense.append(StackedWeight.of(h_in, sum(widths), size))
        factors.append(StackedWeight.of(h_in, sum(low), size))
        factors += [StackedWeight.of(r, width, size) for r, width in zip(low, widths, strict=True)]
    if table.is_full_rank(layer, experts.positions[0].name):
        return dense, []
    return (dense if table.method.has_frozen else []), factors


def build_local_models(config: Config) -> list[LocalModel]:
    """One per pipeline rank."""
    transformer, training = build_transformer_config(config), config.training
    tp, pp = transformer.tensor_model_parallel_size, transformer.pipeline_model_parallel_size
    tokens, element = training.micro_batch_size * training.seq_length, 2 if training.bf16 else 4
    local, stage = tokens // tp if transformer.sequence_parallel else tokens, zero_stage(config)
    models, teachers = [], _teachers(config)
    for rank, teacher in enumerate(teachers):
        chunks = _chunks(transformer, rank)
        weights = [p for chunk in chunks for p in _weights(config, transformer, chunk)]
        sizes = tp, pp, stage, element, tokens, local
        models.append(LocalModel(config, transformer, rank, chunks, weights, *sizes, teacher))
    return models


def _teachers(config: Config) -> list[LocalModel] | list[None]:
    """The teacher's part on each pipeline rank, without what its loss does not need."""
    if config.distillation.teacher is None:
        return [None] * config.parallel.pipeline_model_parallel_size
    found = build_local_models(teacher_config(config))
    if config.distillation.kd_beta:
        return found
    return [
        replace(
            model,
            chunks=[replace(chunk, predicts=False) for chunk in model.chunks],
            weights=[p for p in model.weights if p.layer < config.model.num_layers],
        )
        for model in found
    ]


def _chunks(transformer: CRNetTransformerConfig, pp_rank: int) -> list[Chunk]:
    pp, vpp = transformer.pipeline_model_parallel_size, transformer.virtual_pipeline_model_parallel_size
    chunks = []
    for chunk in range(vpp or 1):
        stage = chunk if vpp else None
        first = get_transformer_layer_offset(transformer, stage, pp_rank)
        layers = range(first, first + get_num_layers_to_build(transformer, stage, pp_rank))
        segments = initial_segments(transformer, layers, pp_rank)
        if transformer.strategy.inverts:
            # without the checkpoints that depend on values
            even = {layer: torch.ones(len(transformer.table.architecture.names)) for layer in layers}
            segments, _ = plan_inverse_segments(transformer, layers, even, even)
        embeds, predicts = pp_rank == chunk == 0, pp_rank == pp - 1 and chunk == (vpp or 1) - 1
        chunks.append(Chunk(layers, embeds, predicts, segments))
    return chunks


def _embedding(transformer: CRNetTransformerConfig) -> int:
    """Elements of the embedding, and of the output layer, on one rank."""
    return transformer.table.local_vocabulary * int(transformer.hidden_size)


def _weights(config: Config, transformer: CRNetTransformerConfig, chunk: Chunk) -> Iterator[LocalParameter]:
    h, sp, last = config.model.hidden_size, transformer.sequence_parallel, config.model.num_layers
    vocabulary = _embedding(transformer)
    architecture = transformer.table.architecture
    if chunk.embeds:
        yield LocalParameter(-1, vocabulary)
        if not architecture.is_rotary:
            yield LocalParameter(-1, (config.model.max_position_embeddings or 0) * h)
    for layer in chunk.layers:
        yield from [LocalParameter(layer, h, sp, "norm")] * (len(NORMS) * len(architecture.norm_suffixes))
        if architecture.has_qk_norm:
            of_heads = transformer.tensor_model_parallel_size > 1
            yield from [LocalParameter(layer, transformer.kv_channels, of_heads, "norm")] * len(QK_NORMS)
        for group in architecture.groups:
            yield from _group(config, transformer, layer, group)
        if architecture.experts is not None:
            yield LocalParameter(layer, transformer.table.num_experts * h, sp, is_expert=True)
            for group in architecture.experts.groups:
                yield from _experts(config, transformer, layer, group)
    if chunk.predicts:
        yield from [LocalParameter(last, h, sp, "norm")] * len(architecture.norm_suffixes)
        if not (transformer.table.ties_head and chunk.embeds):
            yield LocalParameter(last, vocabulary)


def _group(config: Config, transformer: CRNetTransformerConfig, layer: int, group: Group) -> Iterator[LocalParameter]:
    """Parameters of a group of positions."""
    table, t, sp = transformer.table, transformer.tensor_model_parallel_size, transformer.sequence_parallel
    positions, is_row = [position.name for position in group.positions], group.is_row
    ranks, widths = [table.padded_ranks[layer][p] for p in positions], [table.local_shapes[p][1] for p in positions]
    h_in = table.local_shapes[positions[0]][0]
    if table.architecture.has_biases:
        yield LocalParameter(layer, sum(widths), sp and is_row, "norm")
    if table.is_full_rank(layer):
        kind = PROJECTED if config.optimizer.name == "galore" else "matrix"
        yield LocalParameter(layer, h_in * sum(widths), kind=kind)
        return
    yield LocalParameter(layer, sum(ranks) * h_in, sp and not is_row)
    # stacks of one shape are one parameter
    for (width, rank), same in groupby(zip(widths, ranks, strict=True)):
        yield LocalParameter(layer, len(list(same)) * rank * width, sp and is_row)
    if table.method.has_frozen:
        yield LocalParameter(layer, h_in * sum(widths), is_frozen=True)
    if table.has_previous(layer):
        # outputs of a column group are sharded even without sequence parallelism
        yield LocalParameter(layer, len(positions), t > 1 and (sp or not is_row), "beta")


def _experts(config: Config, transformer: CRNetTransformerConfig, layer: int, group: Group) -> Iterator[LocalParameter]:
    """Parameters of a group of positions of this rank's experts."""
    table, size = transformer.table, transformer.expert_model_parallel_size
    count, partial = table.num_experts // size, transformer.sequence_parallel and size == 1
    kind = SPREAD if spans_replicas(transformer) else "matrix"
    shapes, ranks = [table.shapes[name] for name in group.names], [table.padded_ranks[layer][n] for n in group.names]
    h_in, widths = shapes[0][0], [h_out for _, h_out in shapes]
    if table.is_full_rank(layer, group.names[0]):
        kind = PROJECTED if config.optimizer.name == "galore" else kind
        yield LocalParameter(layer, count * h_in * sum(widths), partial, kind, is_expert=True)
        return
    sizes = [sum(ranks) * h_in, *(w * r for w, r in zip(widths, ranks, strict=True))]
    yield from (LocalParameter(layer, count * size, partial, kind, is_expert=True) for size in sizes)
    if table.method.has_frozen:
        yield LocalParameter(layer, count * h_in * sum(widths), kind=kind, is_frozen=True, is_expert=True)
