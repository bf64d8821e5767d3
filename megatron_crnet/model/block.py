"""The layers of one pipeline stage, and the packed tensor that crosses to the next."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import get_pg_rank, make_viewless_tensor
from torch import Tensor

from megatron_crnet.config.megatron import CRNetTransformerConfig
from megatron_crnet.data.documents import PackedDocuments
from megatron_crnet.model.layer import StreamHook, layer_spec
from megatron_crnet.model.norm import CRNetNorm
from megatron_crnet.model.regions import rotation_of
from megatron_crnet.recompute.planner import initial_segments, plan_inverse_segments
from megatron_crnet.recompute.segment import SEGMENTS, Segment
from megatron_crnet.recompute.storage import ActivationStore
from megatron_crnet.recompute.tape import LayerOutputs


def boundary_widths(config: CRNetTransformerConfig, layer: int) -> list[int]:
    """Widths, per local sequence position, of what layer `layer` (from 0) receives from the previous one.

    The hidden state, then the previous layer's outputs unless the layer starts a chain.
    """
    outputs = config.table.architecture.names if config.table.has_previous(layer) else ()
    return [config.hidden_size, *(config.local_width(position) for position in outputs)]


def interleaved_width(config: CRNetTransformerConfig) -> int | None:
    """Width of every boundary under virtual stages, whose schedule knows only one; None without them.

    Megatron-Core can send each shape ahead (`variable_seq_lengths`), but mixes the shapes up where the next
    and the previous rank are the same; a boundary that needs less is padded instead.
    """
    pp, vpp = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    if vpp is None:
        return None
    firsts = [get_transformer_layer_offset(config, chunk, rank) for chunk in range(vpp) for rank in range(pp)]
    return max(sum(boundary_widths(config, layer)) for layer in firsts if layer > 0)


def boundary_size(config: CRNetTransformerConfig, layer: int) -> int:
    """Elements per local sequence position that layer `layer` (from 0) receives, padding included."""
    return interleaved_width(config) or sum(boundary_widths(config, layer))


def pack(hidden_states: Tensor, outputs: LayerOutputs | None, width: int | None = None) -> Tensor:
    """One fresh tensor [s/t, b, sum of boundary widths] from the hidden state [s/t, b, h] and the outputs.

    Args:
        width: pad a hidden state alone to this width.
    """
    if outputs is None:
        return F.pad(hidden_states, (0, (width or hidden_states.shape[-1]) - hidden_states.shape[-1]))
    flat = torch.cat([hidden_states.flatten(), *(y.flatten() for y in outputs)])
    packed = flat.view(*hidden_states.shape[:2], -1)
    # the schedule frees a sent tensor's storage, which it refuses to do for a view
    return make_viewless_tensor(packed, requires_grad=packed.requires_grad, keep_graph=True)


def unpack(packed: Tensor, config: CRNetTransformerConfig, layer: int) -> tuple[Tensor, LayerOutputs | None]:
    """The inverse of `pack` for a stage whose first layer is `layer` (from 0); views, no copies."""
    widths = boundary_widths(config, layer)
    if len(widths) == 1:
        return packed[..., : widths[0]], None
    local, b = packed.shape[:2]
    parts = packed.flatten().split([local * b * width for width in widths])
    full = local * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    architecture = config.table.architecture
    outputs = tuple(
        part.view(local if position in architecture.rows else full, b, -1)
        for position, part in zip(architecture.names, parts[1:], strict=True)
    )
    return parts[0].view(local, b, -1), outputs


class CRNetTransformerBlock(TransformerBlock):
    """Megatron-Core's block with the cross-layer path threaded through layers and pipeline stages."""

    config: CRNetTransformerConfig
    input_tensor: Tensor | None

    def __init__(self, config: CRNetTransformerConfig, vp_stage: int | None, pg_collection: Any, **kwargs: Any) -> None:
        pp_rank = get_pg_rank(pg_collection.pp)
        count = get_num_layers_to_build(config, vp_stage, pp_rank)
        self.first_layer = get_transformer_layer_offset(config, vp_stage, pp_rank)
        submodules = TransformerBlockSubmodules(layer_specs=[layer_spec()] * count, layer_norm=CRNetNorm)
        super().__init__(config, submodules, vp_stage=vp_stage, pg_collection=pg_collection, **kwargs)
        self.segments = initial_segments(config, self.layer_range, pp_rank)
        """Layers (from 0 over the whole model) that are recomputed together; empty without recomputation."""
        self.norm_ratios: dict[int, Tensor] = {}
        """|Y_l| / |Y_{l-1}| of the positions by layer under `inverse`: largest of all tokens since emptied."""
        self.store = ActivationStore(config)
        if config.next_layer_scales:
            for layer, following in pairwise(self.layers):
                layer.scales_gradients_of(following)

    @property
    def layer_range(self) -> range:
        """Numbers of this chunk's layers, from 0 over the whole model."""
        return range(self.first_layer, self.first_layer + len(self.layers))

    def plan_inverse_segments(self, scales: Mapping[int, Tensor], norm_ratios: Mapping[int, Tensor]) -> int:
        """Segments for `inverse`, as `recompute.planner`. Returns how many checkpoints its guard has added."""
        self.segments, added = plan_inverse_segments(self.config, self.layer_range, scales, norm_ratios)
        return added

    def forward(
        self,
        hidden_states: Tensor,
        rotary_pos_emb: Tensor | None = None,
        documents: PackedDocuments | None = None,
        stream_hook: StreamHook | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states: [s/t, b, h]; a later pipeline stage takes the packed `input_tensor` instead.

        Returns the final hidden state on the last stage, the packed boundary tensor elsewhere.
        """
        context: LayerOutputs | None = None
        if not self.pre_process:
            assert self.input_tensor is not None, "a schedule hands over what the stage before has sent"
            hidden_states, context = unpack(self.input_tensor, self.config, self.first_layer)
            self.input_tensor = None  # the graph holds it until backward; here it would stay, with its gradient
        hidden_states = make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True)
        rotation = None
        if rotary_pos_emb is not None:
            rotation = rotation_of(rotary_pos_emb if documents is None else documents.positions_of(rotary_pos_emb))
        shared = {"rotation": rotation, "documents": documents, "stream_hook": stream_hook}
        parallel_random = self.config.sequence_parallel and self.config.has_dropout
        with tensor_parallel.get_cuda_rng_tracker().fork() if parallel_random else nullcontext():
            if self.segments and self.training:
                hidden_states, context = self._recomputed(hidden_states, context, shared)
            else:
                for layer in self.layers:
                    hidden_states, context = layer(hidden_states, context=context, **shared)
        if self.final_layernorm is not None:
            return self.final_layernorm(hidden_states)
        return pack(hidden_states, context, interleaved_width(self.config))

    def _recomputed(
        self, hidden_states: Tensor, context: LayerOutputs | None, shared: Mapping[str, Any]
    ) -> tuple[Tensor, LayerOutputs | None]:
        previous: Segment | None = None
        for numbers in self.segments:
            layers = [self.layers[number - self.first_layer] for number in numbers]
            last = numbers is self.segments[-1]
            make = SEGMENTS[self.config.recompute_strategy]
            segment = make(self.config, layers, self.store, shared, last, self.norm_ratios)
            hidden_states, context = segment(hidden_states, context)
            if previous is not None and previous.passes_on:
                previous.end = segment.start
            previous = segment
        return hidden_states, context
