"""One LLaMA-2 layer: takes the previous layer's linear outputs and returns its own."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from megatron.core.utils import get_pg_rank
from torch import Tensor

from megatron_crnet.config.megatron import CRNetTransformerConfig
from megatron_crnet.data.documents import PackedDocuments
from megatron_crnet.model.attention import SDPACoreAttention
from megatron_crnet.model.linear import LinearGroup, build_group
from megatron_crnet.model.norm import CRNetNorm
from megatron_crnet.recompute.tape import LayerOutputs, LayerTape, Mode


@dataclass
class CRNetLayerSubmodules:
    """What a layer is built from."""

    norm: type = CRNetNorm
    core_attention: ModuleSpec | type = SDPACoreAttention


class CRNetTransformerLayer(MegatronModule, BaseTransformerLayer):
    """Attention and SwiGLU with RMSNorm before each, LLaMA-2 style.

    Args:
        layer_number: number of the layer on its pipeline stage, from 1 (as Megatron-Core counts).
    """

    def __init__(
        self,
        config: CRNetTransformerConfig,
        submodules: CRNetLayerSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, get_pg_rank(groups.pp))
        layer = self.index = self.layer_number - 1
        self.returns_outputs = config.table.has_next(layer)
        norm = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.input_layernorm = submodules.norm(**norm)
        self.linear_qkv = build_group(config, "qkv", groups, layer)
        self.core_attention = build_module(submodules.core_attention, config=config, layer_number=self.layer_number)
        self.linear_o = build_group(config, "o", groups, layer)
        self.pre_mlp_layernorm = submodules.norm(**norm)
        self.linear_gate_up = build_group(config, "gate_up", groups, layer)
        self.linear_down = build_group(config, "down", groups, layer)

    def forward(
        self,
        hidden_states: Tensor,
        context: LayerOutputs | None = None,
        rotary_pos_emb: Tensor | None = None,
        tape: LayerTape | None = None,
        documents: PackedDocuments | None = None,
        **_: Any,
    ) -> tuple[Tensor, LayerOutputs | None]:
        """hidden_states: [s/t, b, h] with sequence parallelism, [s, b, h] without.

        `context` (Megatron-Core's name for what a block threads through its layers) holds the outputs of the
        previous layer, None where a chain starts. Returns the residual stream and this layer's outputs, None
        where the next layer does not use them. With `tape` the call is recorded there or replayed from there, and
        the outputs are returned in any case (`recompute/tape.py`). With `documents`, attention and positions stay
        within them.
        """
        y, m = self._by_group(context), tape.groups if tape else {}
        normed = self.input_layernorm(hidden_states)
        q, k, v = self.linear_qkv(normed, y["qkv"], m.get("qkv"))
        attention = self.attention(q, k, v, rotary_pos_emb, tape, documents)
        (o,) = self.linear_o(attention, y["o"], m.get("o"))
        hidden_states = hidden_states + self._dropout(o, "o", tape)
        normed = self.pre_mlp_layernorm(hidden_states)
        gate, up = self.linear_gate_up(normed, y["gate_up"], m.get("gate_up"))
        (down,) = self.linear_down(F.silu(gate) * up, y["down"], m.get("down"))
        hidden_states = hidden_states + self._dropout(down, "down", tape)
        outputs = (q, k, v, o, gate, up, down)
        return hidden_states, outputs if self.returns_outputs or tape else None

    def rebuild(
        self, hidden_states: Tensor, context: LayerOutputs | None, tape: LayerTape
    ) -> tuple[Tensor, LayerOutputs | None]:
        """What `forward` returned, from the low-rank outputs on the tape: the same operations, the same bits.

        Only the products with B and the additions are done. Where no chain passes, only those that lead to the
        residual stream, and None stands for the outputs.
        """
        tape.enter(Mode.REBUILD)
        rows = [group for group in self.groups if group.is_row]
        outputs = None
        if context is None and not self.returns_outputs:
            for group in rows:
                group_tape = tape.groups[group.group]
                group_tape.outputs = group.rebuild(group_tape, None)
        else:
            previous = self._by_group(context)
            outputs = tuple(y for g in self.groups for y in g.rebuild(tape.groups[g.group], previous[g.group]))
            tape.set_outputs(outputs)
        for group in rows:
            (y,) = tape.groups[group.group].outputs or ()
            hidden_states = hidden_states + self._dropout(y, group.group, tape)
        return hidden_states, outputs

    def invert(self, outputs: LayerOutputs, tape: LayerTape) -> tuple[LayerOutputs, Tensor]:
        """The previous layer's outputs, from this layer's, to rounding, and s(beta) of all positions."""
        tape.enter(Mode.INVERT)
        y = self.config.table.architecture.by_group(outputs)
        pairs = [group.invert(tape.groups[group.group], y[group.group]) for group in self.groups]
        return tuple(chain.from_iterable(previous for previous, _ in pairs)), torch.cat([s for _, s in pairs])

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linear groups, in the order of the architecture."""
        return self.linear_qkv, self.linear_o, self.linear_gate_up, self.linear_down

    def _by_group(self, outputs: LayerOutputs | None) -> dict[str, Any]:
        """Outputs of each group, None for all of them where a chain starts."""
        architecture = self.config.table.architecture
        if outputs is None:
            return dict.fromkeys(group.name for group in architecture.groups)
        return architecture.by_group(outputs)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary_pos_emb: Tensor | None,
        tape: LayerTape | None = None,
        documents: PackedDocuments | None = None,
    ) -> Tensor:
        """Self-attention of the local heads; q, k, v: [s, b, local width]. Returns [s, b, h/t]."""
        q, k, v = (x.unflatten(-1, (-1, self.config.kv_channels)) for x in (q, k, v))
        if documents is not None:
            q, k = documents.rotate(q), documents.rotate(k)
        elif rotary_pos_emb is not None:
            q = apply_rotary_pos_emb(q, rotary_pos_emb, config=self.config)
            k = apply_rotary_pos_emb(k, rotary_pos_emb, config=self.config)
        return self.core_attention(q, k, v, tape, documents)

    def _dropout(self, x: Tensor, point: str, tape: LayerTape | None) -> Tensor:
        with tape.rng_scope(point) if tape else nullcontext():
            return F.dropout(x, p=self.config.hidden_dropout, training=self.training)


def layer_spec() -> ModuleSpec:
    """The spec that a block fans out over its layers."""
    return ModuleSpec(module=CRNetTransformerLayer, submodules=CRNetLayerSubmodules())
