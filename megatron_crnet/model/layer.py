"""One layer of any architecture: takes the previous layer's linear outputs and returns its own."""

from __future__ import annotations

from collections.abc import Callable
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

from megatron_crnet.config.architectures import Group
from megatron_crnet.config.megatron import CRNetTransformerConfig
from megatron_crnet.data.documents import PackedDocuments
from megatron_crnet.model.attention import SDPACoreAttention
from megatron_crnet.model.bias import GroupBias
from megatron_crnet.model.compiled import choose_glue
from megatron_crnet.model.experts import build_experts
from megatron_crnet.model.linear import LinearGroup, LowRankGroup, build_group
from megatron_crnet.model.norm import CRNetNorm, LeanNorm, lean_rms_norm
from megatron_crnet.model.regions import HeadNorms, Regions, Rotation
from megatron_crnet.recompute.tape import LayerOutputs, LayerTape, Mode

StreamHook = Callable[[int, Tensor], Tensor]
"""Takes a layer's index (from 0) and the residual stream behind it, [s/t, b, h], and returns the stream to go on with,
of the same values: recomputation rebuilds streams without it."""
EXPERTS = "experts"
"""Where dropout is drawn for what experts give."""


@dataclass
class CRNetLayerSubmodules:
    """What a layer is built from."""

    norm: type = CRNetNorm
    core_attention: ModuleSpec | type = SDPACoreAttention


class CRNetTransformerLayer(MegatronModule, BaseTransformerLayer):
    """Attention and a feed-forward network with a norm before each; what they are made of says the architecture.

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
        architecture, width, eps = config.table.architecture, config.hidden_size, config.layernorm_epsilon
        self.input_layernorm = submodules.norm(config=config, hidden_size=width, eps=eps)
        self.core_attention = build_module(submodules.core_attention, config=config, layer_number=self.layer_number)
        self.pre_mlp_layernorm = submodules.norm(config=config, hidden_size=width, eps=eps)
        if architecture.has_qk_norm:
            # each tensor-parallel rank sees heads of its own
            of_heads = {"width": config.kv_channels, "eps": eps, "is_partial": config.tensor_model_parallel_size > 1}
            self.q_layernorm, self.k_layernorm = lean_rms_norm(config, **of_heads), lean_rms_norm(config, **of_heads)
        self.linear = nn.ModuleDict({g.name: build_group(config, g.name, groups, layer) for g in architecture.groups})
        self.experts = build_experts(config, layer, groups) if architecture.experts is not None else None
        biased = architecture.groups if architecture.has_biases else ()
        self.biases = nn.ModuleDict({group.name: GroupBias(config, group, groups) for group in biased})
        glue = choose_glue(next(self.linear.parameters()), config.cross_layer_fusion)
        self.regions = Regions(glue, config.cross_layer_epsilon, config.table.activates)
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
        stream_hook: StreamHook | None = None,
        **_: Any,
    ) -> tuple[Tensor, LayerOutputs | None]:
        """hidden_states: [s/t, b, h] with sequence parallelism, [s, b, h] without.

        `context` (Megatron-Core's name for what a block threads through its layers) holds the outputs of the
        previous layer, None where a chain starts. Returns the residual stream and this layer's outputs, None
        where the next layer does not use them. With `tape` the call is recorded there or replayed from there, and
        the outputs are returned in any case (`recompute/tape.py`). With `documents`, attention stays within them, as
        `rotation` does. `stream_hook` is called with the layer's index and its residual stream.
        """
        of_qkv, of_o, *feed_forward = self.config.table.architecture.groups
        y, m = self._by_group(context), tape.groups if tape else {}

        def linear(group: Group, x: Tensor) -> LayerOutputs:
            found: LayerOutputs = self.linear[group.name](x, y[group.name], m.get(group.name))
            return found

        normed, hidden_states = _norm(self.input_layernorm, hidden_states)
        inputs, outputs = self._attention_inputs(rotation, linear(of_qkv, normed))
        attention = self.core_attention(*inputs, tape, documents)
        (o,), carried = self._carry(of_o.name, linear(of_o, attention))
        outputs, hidden_states = outputs + carried, hidden_states + self._dropout(o, of_o.name, tape)
        normed, hidden_states = _norm(self.pre_mlp_layernorm, hidden_states)
        if self.experts is not None:
            hidden_states = hidden_states + self._dropout(self._mixture(normed, tape), EXPERTS, tape)
        else:
            inner, of_down = feed_forward
            activation, carried = self._activate(inner.name, linear(inner, normed))
            (down,), of_rows = self._carry(of_down.name, linear(of_down, activation))
            outputs = outputs + carried + of_rows
            hidden_states = hidden_states + self._dropout(down, of_down.name, tape)
        if stream_hook is not None:
            hidden_states = stream_hook(self.index, hidden_states)
        return hidden_states, outputs if self.returns_outputs or tape else None

    def _mixture(self, x: Tensor, tape: LayerTape | None) -> Tensor:
        """What the experts give, which a tape keeps for `rebuild`: less than what runs them again would need."""
        assert self.experts is not None
        y: Tensor = self.experts(x)[0]
        if tape is not None and tape.mode is Mode.RECORD and tape.rebuilds_stream:
            tape.experts.save(y)
        return y

    def _attention_inputs(
        self, rotation: Rotation | None, outputs: LayerOutputs
    ) -> tuple[tuple[Tensor, ...], LayerOutputs]:
        """Query, key and value, [s, b, heads, d], from q, k and v; and these for the next layer."""
        has_qk_norm = self.config.table.architecture.has_qk_norm
        if rotation is None:
            used, outputs = self._carry("qkv", outputs)
            query, key, value = (self._heads(x) for x in used)
            if has_qk_norm:
                query, key = self.q_layernorm(query), self.k_layernorm(key)
            return (query, key, value), outputs
        norms = None
        if has_qk_norm:
            norms = HeadNorms(self.q_layernorm.weight, self.k_layernorm.weight, self.config.layernorm_epsilon)
        if self.biases:
            used, outputs = self._carry("qkv", outputs)
            (query, key, v), _ = self.regions.rotary(rotation, norms, None, *used)
        else:
            (query, key, v), outputs = self.regions.rotary(rotation, norms, self._next_betas("qkv"), *outputs)
        return (query, key, self._heads(v)), outputs

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.kv_channels))

    def _activate(self, group: str, outputs: LayerOutputs) -> tuple[Tensor, LayerOutputs]:
        """The input of down from the outputs of `group`; and these for the next layer."""
        is_gated, betas = self.config.table.architecture.activation == "swiglu", self._next_betas(group)
        if not self.biases:
            if is_gated:
                return self.regions.swiglu(betas, *outputs)
            (activation,), outputs = self.regions.gelu(betas, None, *outputs)
            return activation, outputs
        used, outputs = self.biases[group](betas, *outputs)
        return self.regions.swiglu(None, *used)[0] if is_gated else used[0], outputs

    def rebuild(
        self, hidden_states: Tensor, context: LayerOutputs | None, tape: LayerTape
    ) -> tuple[Tensor, LayerOutputs | None]:
        """What `forward` returned, from the low-rank outputs on the tape: the same operations, the same bits.

        Only the products with B and the additions are done. Where no chain passes, only those that lead to the
        residual stream, and None stands for the outputs. Of a layer with experts the stream is whole only where the
        tape says that it will be rebuilt.
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
            used = tape.groups[group.group].outputs or ()
            if self.biases:
                used, _ = self.biases[group.group](None, *used)
            (y,) = used
            hidden_states = hidden_states + self._dropout(y, group.group, tape)
        if self.experts is not None and tape.rebuilds_stream:
            hidden_states = hidden_states + self._dropout(tape.experts.saved(), EXPERTS, tape)
        return hidden_states, outputs

    def invert(self, outputs: LayerOutputs, tape: LayerTape) -> tuple[LayerOutputs, Tensor]:
        """The previous layer's outputs, from this layer's, to rounding, and s(beta) of all positions."""
        tape.enter(Mode.INVERT)
        y = self.config.table.architecture.by_group(outputs)
        pairs = [group.invert(tape.groups[group.group], y[group.group]) for group in self.groups]
        return tuple(chain.from_iterable(previous for previous, _ in pairs)), torch.cat([s for _, s in pairs])

    @property
    def parameters_read(self) -> list[nn.Parameter]:
        """Weights of modules that are not called but read, which ZeRO-3 has to gather for the layer's call."""
        architecture = self.config.table.architecture
        return [self.q_layernorm.weight, self.k_layernorm.weight] if architecture.has_qk_norm else []

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linear groups, in the order of the architecture."""
        return tuple(self.linear.values())  # type: ignore[arg-type]

    def _by_group(self, outputs: LayerOutputs | None) -> dict[str, Any]:
        """Outputs of each group, None for all of them where a chain starts."""
        architecture = self.config.table.architecture
        if outputs is None:
            return dict.fromkeys(group.name for group in architecture.groups)
        return architecture.by_group(outputs)

    def _carry(self, group: str, outputs: LayerOutputs) -> tuple[LayerOutputs, LayerOutputs]:
        """Outputs of a group for this layer, with their biases, and for the next one."""
        betas = self._next_betas(group)
        if self.biases:
            found: tuple[LayerOutputs, LayerOutputs] = self.biases[group](betas, *outputs)
            return found
        return self.regions.carry(betas, None, *outputs) if self.returns_outputs else (outputs, outputs)

    def _next_betas(self, group: str) -> Tensor | None:
        following = self._next_groups.get(group)
        return following.exact_betas() if following is not None else None

    def _dropout(self, x: Tensor, point: str, tape: LayerTape | None) -> Tensor:
        with tape.rng_scope(point) if tape else nullcontext():
            return F.dropout(x, p=self.config.hidden_dropout, training=self.training)


def _norm(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return norm(x, with_stream=True) if isinstance(norm, LeanNorm) else (norm(x), x)


def layer_spec() -> ModuleSpec:
    """The spec that a block fans out over its layers."""
    return ModuleSpec(module=CRNetTransformerLayer, submodules=CRNetLayerSubmodules())
