"""Glue of a layer: what operations other than matrix products and attention read and write, and how many there are.

Counted on fake tensors, so any size fits, as the difference between a decoder of four layers and one of three. An
operation of PyTorch counts its inputs and outputs once; a region that is compiled as a whole counts its own, and one
launch; a product that takes the residual along (`model/residual_product.py`) is a product alone, as on GPUs that have
the kernel. `addmm` out of place counts the copy of its third input that PyTorch makes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter as Tally
from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._subclasses import FakeTensorMode

from megatron_crnet.config.megatron import build_transformer_config
from megatron_crnet.config.positions import position_table
from megatron_crnet.config.schema import Config, RecomputeConfig, Variant
from megatron_crnet.config.variants import as_variant, on_one_process
from megatron_crnet.distributed.process_groups import initialize_parallel
from megatron_crnet.model.block import CRNetTransformerBlock
from megatron_crnet.model.glue import EAGER
from megatron_crnet.model.linear import LowRankGroup
from megatron_crnet.model.residual_product import suits, two_passes
from megatron_crnet.planning.counters import Counter, tensors_in
from megatron_crnet.planning.even_experts import even_experts

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_", "_grouped_mm")
ATTENTION = "scaled_dot_product"
NO_TRAFFIC = (
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "alias",
    "_unsafe_view",
)
OVERWRITES = ("copy_", "zero_", "fill_")


class GlueCounter(Counter):
    """Bytes and launches by kind of operation or region; products and attention have launches alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Tally[str] = Tally()
        self.launches: Tally[str] = Tally()
        self._in_region = False

    def observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count an operation that moves data and belongs to no region."""
        name = func._opname
        if self._in_region or func.is_view or func.namespace == "prim" or name in NO_TRAFFIC:
            return
        if name in PRODUCTS:
            self.launches["products"] += 1
            if name in ("addmm", "baddbmm"):
                self._count("copy_", (args[0], out))
        elif ATTENTION in name:
            self.launches["attention"] += 1
        else:
            self._count(name, (args[1:] if name in OVERWRITES else args, out))

    def region(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted as one operation."""

        def counted(*args: Any) -> Any:
            out = self._uncounted(function, *args)
            self._count(name, (args, out))
            return out

        return counted

    def product(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted as one matrix product."""

        def counted(*args: Any) -> Any:
            self.launches["products"] += 1
            return self._uncounted(function, *args)

        return counted

    def _uncounted(self, function: Callable[..., Any], *args: Any) -> Any:
        self._in_region = True
        try:
            return function(*args)
        finally:
            self._in_region = False

    def _count(self, name: str, tensors: Any) -> None:
        self.bytes[name] += sum(x.numel() * x.element_size() for x in tensors_in(tensors))
        self.launches[name] += 1


def is_backward(name: str) -> bool:
    """Whether a region of `model/glue.py` belongs to backward."""
    return name.endswith("_backward") or name == "add_carried"


def measure_glue(config: Config, variants: Iterable[Variant]) -> list[dict[str, Any]]:
    """One record per variant: of a layer that has a previous and a next one, in one process without parallelism.

    Returns:
        `variant`; `bytes_per_token_layer` and `launches_per_layer` of both passes; `forward` and `backward`, each with
        `bytes` per token and `launches` by operation or region.
    """
    single = on_one_process(config)
    context = initialize_parallel(single)
    try:
        return [_record(single, variant) for variant in variants]
    finally:
        context.heartbeat.close()
        parallel_state.destroy_model_parallel()


def _record(config: Config, variant: Variant) -> dict[str, Any]:
    tokens = config.training.micro_batch_size * config.training.seq_length
    passes = {}
    for name, less, more in zip(("forward", "backward"), *(_counted(config, variant, n) for n in (3, 4)), strict=True):
        kinds = [kind for kind, count in more.launches.items() if count > less.launches[kind]]
        passes[name] = {
            kind: {
                "bytes": (more.bytes[kind] - less.bytes[kind]) / tokens,
                "launches": more.launches[kind] - less.launches[kind],
            }
            for kind in kinds
        }
    kinds_of_both = [counts for of_pass in passes.values() for counts in of_pass.values()]
    return {
        "variant": variant,
        "bytes_per_token_layer": sum(counts["bytes"] for counts in kinds_of_both),
        "launches_per_layer": sum(counts["launches"] for counts in kinds_of_both),
        **passes,
    }


def _counted(config: Config, variant: Variant, layers: int) -> tuple[GlueCounter, GlueCounter]:
    """Counters of the forward and the backward pass of a micro-batch through a decoder of few layers."""
    table = position_table(config.model)
    rank: Any = table.last_factored or min(config.model.hidden_size // 4, *map(min, table.shapes.values()))
    plain = dataclasses.replace(config, recompute=RecomputeConfig())
    counted = as_variant(plain, variant, num_layers=layers, rank=rank)
    transformer, model = build_transformer_config(counted), counted.model
    forward, backward = GlueCounter(), GlueCounter()
    with FakeTensorMode(), even_experts(transformer.table):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        block = CRNetTransformerBlock(transformer, None, groups, pre_process=True, post_process=False).train()
        shape = config.training.seq_length, config.training.micro_batch_size, model.hidden_size
        device = next(block.parameters()).device
        hidden = torch.empty(shape, dtype=transformer.params_dtype, device=device, requires_grad=True)
        is_rotary = transformer.table.architecture.is_rotary
        rotary = torch.empty(shape[0], 1, 1, transformer.kv_channels, device=device) if is_rotary else None
        regions = EAGER.map(lambda name, function: (backward if is_backward(name) else forward).region(name, function))
        for module in block.modules():
            if hasattr(module, "glue"):
                module.glue = regions
            if hasattr(module, "regions"):
                module.regions = dataclasses.replace(module.regions, glue=regions)
            if isinstance(module, LowRankGroup) and suits(module.a.dtype, (b.shape for b in module.stacks())):
                module.regions = dataclasses.replace(module.regions, residual=forward.product(two_passes))
        with forward:
            out = block(hidden, rotary_pos_emb=rotary)
        with backward:
            out.backward(torch.empty_like(out))
    return forward, backward
