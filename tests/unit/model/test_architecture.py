"""Nothing outside of the layer that is built from an architecture assumes LLaMA's seven positions."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_crnet.config.architectures import Architecture, Group, Position
from megatron_crnet.config.megatron import CRNetTransformerConfig, build_transformer_config
from megatron_crnet.config.model_size import map_counts
from megatron_crnet.config.positions import PositionTable
from megatron_crnet.model.block import boundary_widths, pack, unpack
from megatron_crnet.recompute.planner import layer_widths
from megatron_crnet.recompute.segment import Boundary
from megatron_crnet.recompute.storage import ActivationStore
from megatron_crnet.recompute.tape import LayerTape
from tests.helpers import tiny_config

H, FFN, RANK = 32, 48, 3
SIX = Architecture(
    groups=(
        Group("qkv", tuple(Position(name, f"attn.{name}", "hidden", "hidden") for name in "qkv")),
        Group("proj", (Position("proj", "attn.proj", "hidden", "hidden"),), is_row=True),
        Group("fc", (Position("fc", "mlp.fc", "hidden", "ffn"),)),
        Group("out", (Position("out", "mlp.out", "ffn", "hidden"),), is_row=True),
    ),
)
SHAPES = {**dict.fromkeys(("q", "k", "v", "proj"), (H, H)), "fc": (H, FFN), "out": (FFN, H)}


@pytest.fixture
def config() -> CRNetTransformerConfig:
    """Two layers, the second of which continues a chain."""
    config = copy.copy(build_transformer_config(tiny_config({"num_layers": 2})))
    ranks = (dict.fromkeys(SIX.names, 0), dict.fromkeys(SIX.names, RANK))
    config.table = PositionTable(SIX, ranks, frozenset({0}), SHAPES)
    return config


def test_a_boundary_packs_as_many_outputs_as_there_are_positions(config: CRNetTransformerConfig) -> None:
    assert boundary_widths(config, 1) == [H, H, H, H, H, FFN, H]
    hidden, outputs = torch.randn(5, 2, H), tuple(torch.randn(5, 2, SHAPES[name][1]) for name in SIX.names)
    stream, found = unpack(pack(hidden, outputs), config, 1)
    assert found is not None
    assert all(torch.equal(a, b) for a, b in zip((stream, *found), (hidden, *outputs), strict=True))
    saved = Boundary(SIX, ActivationStore(config), hidden, outputs)
    assert saved.outputs is not None
    assert all(torch.equal(a, b) for a, b in zip(saved.outputs, outputs, strict=True))


def test_widths_and_parameters_follow_from_the_table(config: CRNetTransformerConfig) -> None:
    first, second = (layer_widths(config, layer) for layer in range(2))
    all_outputs = 5 * H + FFN
    assert (first.start, second.start) == (H, H + all_outputs)
    assert (first.z, second.z) == (0, 6 * RANK)
    # nothing follows the last layer: the outputs that join the residual stream are not kept
    assert second.activations == 4 * H + H + FFN + 6 * RANK + all_outputs - 2 * H
    assert sum(map_counts(config.table, 1)) == RANK * (4 * 2 * H + 2 * (H + FFN))
    assert config.table.shapes[config.table.position_of("model.layers.1.mlp.out.b.weight")][0] == FFN


def test_a_tape_has_a_part_for_each_group(config: CRNetTransformerConfig) -> None:
    tape = LayerTape(config, outputs_known=True)
    outputs = tuple(torch.full((), float(i)) for i in range(6))
    tape.set_outputs(outputs)
    assert [group.outputs for group in tape.groups.values()] == [outputs[:3], outputs[3:4], outputs[4:5], outputs[5:]]
