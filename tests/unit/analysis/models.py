"""Small dense models in files, and rows to run through them."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_crnet.analysis.maps import maps_by_input
from megatron_crnet.analysis.source import SourceModel
from megatron_crnet.analysis.stream import MIXTURE, STREAM
from megatron_crnet.config.schema import Config, DataConfig
from megatron_crnet.model.reference import ReferenceCRNet
from tests.helpers import tiny_config
from tests.unit.export_helpers import random_weights, write_checkpoint

DENSE: dict[str, Any] = {"vocab_size": 416, "variant": "full_rank", "num_query_groups": 2}


def dense_checkpoint(folder: Path, tokenizer: str, **model: Any) -> Path:
    """A checkpoint of random weights in FOLDER/step_00000001."""
    config = dataclasses.replace(tiny_config(model={**DENSE, **model}), data=DataConfig(tokenizer_model=tokenizer))
    return write_checkpoint(folder / "step_00000001", random_weights(config), config)


def changed(config: Config, **model: Any) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def random_rows(rows: int = 6, length: int = 16) -> Tensor:
    return torch.randint(416, (rows, length), generator=torch.Generator().manual_seed(2))


def reference(config: Config, weights: dict[str, Tensor]) -> ReferenceCRNet:
    model = ReferenceCRNet(config.model)
    model.load_state_dict(weights)
    return model.requires_grad_(False)


def activations(source: SourceModel, rows: Tensor) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Inputs and outputs [tokens, width] of all maps of a plain forward pass, by layer and name, in fp64.

    The layers themselves are among them, as `STREAM`, and their experts together, as `MIXTURE`.
    """
    model = reference(source.config, source.read("")).double()
    found: list[dict[str, tuple[Tensor, Tensor]]] = []
    for layer in model.model["layers"]:
        found.append({})
        maps = maps_by_input(layer.architecture, source.config.model.num_experts or 0)
        for one in (one for group in maps for one in group):

            def hook(_module: Any, x: Any, y: Tensor, name: str = one.name, at: Any = found[-1]) -> None:
                at[name] = x[0].flatten(0, -2), y.flatten(0, -2)

            layer.get_submodule(one.module).register_forward_hook(hook)
        if source.table.num_experts:
            layer.mlp.register_forward_hook(partial(hook, name=MIXTURE, at=found[-1]))

        def layer_hook(_module: Any, x: Any, y: Any, at: Any = found[-1]) -> None:
            at[STREAM] = x[0].flatten(0, 1), y[0].flatten(0, 1)

        layer.register_forward_hook(layer_hook)
    model(rows)
    return found
