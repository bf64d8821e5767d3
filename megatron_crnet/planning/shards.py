"""Which parameters and layers one rank holds, from the configuration alone: what `model/gpt.py` builds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_crnet.config.megatron import CRNetTransformerConfig, build_transformer_config
from megatron_crnet.config.model_size import position_shapes
from megatron_crnet.config.positions import GROUPS, POSITIONS
from megatron_crnet.config.schema import Config
from megatron_crnet.recompute.planner import STRATEGIES, initial_segments, plan_inverse_segments


@dataclass(frozen=True)
class Chunk:
    """A run of layers on one rank.

    Attributes:
        layers: numbers from 0 over the whole model.
        embeds: the embedding is here, too.
        predicts: final norm, output layer and loss are here, too.
        segments: layers that are recomputed together; empty without recomputation.
    """

    layers: range
    embeds: bool
    predicts: bool
    segments: list[range]


@dataclass(frozen=True)
class LocalParameter:
    """One parameter tensor of a rank.

    Attributes:
        owner: the module that holds it, such as `3.qkv` in layer 3; `estimate_zero3.visits` names them so, too.
        numel: elements on this rank.
        is_matrix: it is decayed, and in a parameter group of matrices.
        is_partial: its gradient is a partial sum over tensor-parallel ranks.
        is_beta: it stays fp32 under bf16 (but at ZeRO-3).
    """

    owner: str
    numel: int
    is_matrix: bool = True
    is_partial: bool = False
    is_beta: bool = False


@dataclass(frozen=True)
class LocalModel:
    """The part of the model of every rank of pipeline stage `pp_rank`; tensor-parallel ranks are alike.

    Attributes:
        parameters: in the order of PyTorch's `parameters()`.
    """

    config: Config
    transformer: CRNetTransformerConfig
    pp_rank: int
    chunks: list[Chunk]
    parameters: list[LocalParameter]

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.transformer.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        """Pipeline-parallel size."""
        return self.transformer.pipeline_model_parallel_size


def build_local_models(config: Config) -> list[LocalModel]:
    """One for each pipeline rank."""
    transformer = build_transformer_config(config)
    return [
        LocalModel(
            config, transformer, rank, chunks, [p for chunk in chunks for p in _parameters(config, transformer, chunk)]
        )
        for rank in range(transformer.pipeline_model_parallel_size)
        for chunks in [_chunks(transformer, rank)]
    ]


def _chunks(transformer: CRNetTransformerConfig, pp_rank: int) -> list[Chunk]:
    pp, vpp = transformer.pipeline_model_parallel_size, transformer.virtual_pipeline_model_parallel_size
    chunks = []
    for chunk in range(vpp or 1):
        stage = chunk if vpp else None
        first = get_transformer_layer_offset(transformer, stage, pp_rank)
        layers = range(first, first + get_num_layers_to_build(transformer, stage, pp_rank))
        segments = initial_segments(transformer, layers, pp_rank)
        if STRATEGIES[transformer.recompute_strategy].inverts:
            # without what its guard may add: values decide that
            even = {layer: torch.ones(len(POSITIONS)) for layer in layers}
            segments, _ = plan_inverse_segments(transformer, layers, even, even)
        chunks.append(
            Chunk(layers, pp_rank == 0 and chunk == 0, pp_rank == pp - 1 and chunk == (vpp or 1) - 1, segments)
        )
    return chunks


def _parameters(config: Config, transformer: CRNetTransformerConfig, chunk: Chunk) -> Iterator[LocalParameter]:
    h, t, sp = config.model.hidden_size, transformer.tensor_model_parallel_size, transformer.sequence_parallel
    vocabulary = config.model.vocab_size // t * h
    if chunk.embeds:
        yield LocalParameter("embedding.word", vocabulary)
    for layer in chunk.layers:
        for norm, groups in (("input_norm", ("qkv", "o")), ("mlp_norm", ("gate_up", "down"))):
            yield LocalParameter(f"{layer}.{norm}", h, False, sp)
            for group in groups:
                yield from _group(config, transformer, layer, group)
    if chunk.predicts:
        yield LocalParameter("final_norm", h, False, sp)
        yield LocalParameter("output", vocabulary)


def _group(config: Config, transformer: CRNetTransformerConfig, layer: int, group: str) -> Iterator[LocalParameter]:
    shapes, t, sp = position_shapes(config.model), transformer.tensor_model_parallel_size, transformer.sequence_parallel
    positions, owner = GROUPS[group], f"{layer}.{group}"
    ranks = [transformer.ranks[layer][p] for p in positions]
    h_in, widths, is_row = shapes[positions[0]][0], [shapes[p][1] for p in positions], len(positions) == 1
    if transformer.is_full_rank(layer):
        # held by Megatron-Core's layer inside of the group
        yield LocalParameter(f"{owner}.linear", h_in * sum(widths) // t)
        return
    yield LocalParameter(owner, sum(ranks) * h_in // (t if is_row else 1), True, sp and not is_row)
    local = widths if is_row else [width // t for width in widths]
    # stacks of one shape are one parameter
    for (width, rank), same in groupby(zip(local, ranks, strict=True)):
        yield LocalParameter(owner, len(list(same)) * width * rank, True, sp and is_row)
    if transformer.has_previous(layer):
        # a column group's beta sees only a shard of its outputs even without sequence parallelism
        yield LocalParameter(owner, len(positions), False, t > 1 and (sp or not is_row), True)
