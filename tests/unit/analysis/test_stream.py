"""Sums over layers, batches and devices are those of whole activations that a plain forward pass gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_crnet.analysis.source import open_source
from megatron_crnet.analysis.stream import MIXTURE, STREAM, Activations, Map, Sums
from tests.helpers import ARCHITECTURES
from tests.unit.analysis.models import activations, dense_checkpoint, random_rows


def everything(sums: Sums, maps: dict[str, Map]) -> None:
    for position, one in maps.items():
        sums.add_product(("xx", position), one.x, one.x)
        sums.add_product(("yy", position), one.y, one.y)
        sums.add(("tokens", position), torch.tensor(len(one.y)))
        if one.previous is not None:
            sums.add_product(("xp", position), one.x, one.previous)
            sums.add_product(("yp", position), one.y, one.previous)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    "model",
    [
        {"variant": "full_rank"},
        {},
        ARCHITECTURES["gpt2"],
        {"variant": "full_rank", **ARCHITECTURES["qwen3"]},
        ARCHITECTURES["qwen3_moe"],
    ],
)
def test_sums_are_those_of_whole_activations(
    model: dict[str, Any], devices: int, tokenizer: str, tmp_path: Path
) -> None:
    source = open_source(dense_checkpoint(tmp_path, tokenizer, **{"variant": "crnet", **model}))
    rows = random_rows(5)
    wanted = activations(source, rows)
    stream = Activations(source.embed(rows), 2, [torch.device("cpu")] * devices, carries_mixture=True)
    for index in range(4):
        measured = stream.measure(source.layer(index), everything)
        sums = stream.advance(source.layer(index), everything)
        assert all(torch.equal(measured[key], value) for key, value in sums.items())
        for position, (x, y) in wanted[index].items():
            products = {"xx": (x, x), "yy": (y, y)}
            is_chained = position in (MIXTURE, STREAM, *source.table.architecture.names)
            if index and is_chained:
                products |= {"xp": (x, wanted[index - 1][position][1]), "yp": (y, wanted[index - 1][position][1])}
            for name, (a, b) in products.items():
                torch.testing.assert_close(sums[name, position], a.T @ b, rtol=1e-4, atol=1e-4)
            assert int(sums["tokens", position]) == len(y)
            assert len(y) == 80 or not is_chained
            assert (("xp", position) in sums) == (is_chained and (index > 0 or position == STREAM))
