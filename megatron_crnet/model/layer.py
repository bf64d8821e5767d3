"""One LLaMA-2 layer: takes the previous layer's linear outputs and returns its own."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from megatron.core.utils import get_pg_rank
from torch import Tensor, nn

from megatron_crnet.config.megatron import CRNetTransformerConfig
from megatron_crnet.data.documents import PackedDocuments
from megatron_crnet.model.attention import SDPACoreAttention
from megatron_crnet.model.compiled import choose_glue
from megatron_crnet.model.linear import LinearGroup, LowRankGroup, build_group
from megatron_crnet.model.norm import CRNetNorm, LeanRMSNorm
from megatron_crnet.model.regions import Regions, Rotation
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
        glue = choose_glue(next(self.linear_o.parameters()), config.cross_layer_fusion)
        self.regions = Regions(glue, config.cross_layer_epsilon, config.table.gate_has_silu)
        self._next_groups: dict[str, LowRankGroup] = {}

    def scales_gradients_of(self, following: CRNetTransformerLayer) -> None:
        """Multiply what `following`, the next layer, sends back by its s(beta), here, where its outputs are at hand."""
        for group in following.groups:
            if isinstance(group, LowRankGroup):
                group.receives = False
                self._next_groups[group.group] = group

    def forward(
        self,
        hidden_states: Tensor,
        context: LayerOutputs | None = None,
        rotation: Rotation | None = None,
        tape: LayerTape | None = None,
        documents: PackedDocuments | None = None,
        **_: Any,
    ) -> tuple[Tensor, LayerOutputs | None]:
        """hidden_states: [s/t, b, h] with sequence parallelism, [s, b, h] without.

        `context` (Megatron-Core's name for what a block threads through its layers) holds the outputs of the
        previous layer, None where a chain starts. Returns the residual stream and this layer's outputs, None
        where the next layer does not use them. With `tape` the call is recorded there or replayed from there, and
        the outputs are returned in any case (`recompute/tape.py`). With `documents`, attention stays within them, as
        `rotation` does.
        """
        assert rotation is not None
        y, m = self._by_group(context), tape.groups if tape else {}
        normed, hidden_states = _norm(self.input_layernorm, hidden_states)
        q, k, v = self.linear_qkv(normed, y["qkv"], m.get("qkv"))
        (query, key, v), outputs = self.regions.rotary(rotation, self._next_betas("qkv"), q, k, v)
        value = v.unflatten(-1, (-1, self.config.kv_channels))
        attention = self.core_attention(query, key, value, tape, documents)
        (o,) = self.linear_o(attention, y["o"], m.get("o"))
        used, carried = self._carry(o, "o")
        outputs, hidden_states = outputs + carried, hidden_states + self._dropout(used, "o", tape)
        normed, hidden_states = _norm(self.pre_mlp_layernorm, hidden_states)
        gate, up = self.linear_gate_up(normed, y["gate_up"], m.get("gate_up"))
        activation, carried = self.regions.swiglu(self._next_betas("gate_up"), gate, up)
        (down,) = self.linear_down(activation, y["down"], m.get("down"))
        used, of_down = self._carry(down, "down")
        outputs, hidden_states = outputs + carried + of_down, hidden_states + self._dropout(used, "down", tape)
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

    def _carry(self, y: Tensor, group: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.regions.carry(self._next_betas(group), y) if self.returns_outputs else (y, (y,))

    def _next_betas(self, group: str) -> Tensor | None:
        following = self._next_groups.get(group)
        return following.exact_betas() if following is not None else None

    def _dropout(self, x: Tensor, point: str, tape: LayerTape | None) -> Tensor:
        with tape.rng_scope(point) if tape else nullcontext():
            return F.dropout(x, p=self.config.hidden_dropout, training=self.training)


def _norm(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return norm(x, with_stream=True) if isinstance(norm, LeanRMSNorm) else (norm(x), x)


def layer_spec() -> ModuleSpec:
    """The spec that a block fans out over its layers."""
    return ModuleSpec(module=CRNetTransformerLayer, submodules=CRNetLayerSubmodules())
