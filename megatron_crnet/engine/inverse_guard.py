"""Segments of recomputation by division: from the betas and the norms of the outputs, agreed over ranks.

`inverse` divides an output's error by s(beta) at each layer; relative to the previous layer's output, it also grows by
|Y_l| / |Y_{l-1}|. Both change with training, so segments are planned after each update (docs/recomputation.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_crnet.model.block import CRNetTransformerBlock
from megatron_crnet.model.glue import signed_scale
from megatron_crnet.model.linear import LowRankGroup


class InverseGuard:
    """Plans the segments of this rank's blocks.

    Attributes:
        added: checkpoints that the guard has added on all pipeline stages.
        ratios: norm ratios of the positions by layer of this stage, on the host, that the last plan went by.
        is_calibrated: whether ratios are known of all stages, of which some may have none.
    """

    def __init__(self, blocks: Sequence[CRNetTransformerBlock], device: torch.device) -> None:
        self.blocks, self.device = blocks, device
        self.added, self.ratios, self.is_calibrated = 0, dict[int, Tensor](), False

    def plan(self, betas: dict[LowRankGroup, Tensor]) -> None:
        """Plan by the betas and the norm ratios that passes have recorded; a collective call.

        The largest ratio over the tensor- and data-parallel ranks of this stage counts, so that all of them invert the
        same layers and every rank's own shard stays within the tolerance. A ratio that is not known counts as 1.

        Args:
            betas: the exact beta of each group with a residual.
        """
        scales, recorded = _scales_by_layer(betas), _largest_ratios(self.blocks)
        layers, known = sorted(scales), [layer for layer in sorted(scales) if layer in recorded]
        # one transfer to the host
        values = [scales[layer] for layer in layers] + [recorded[layer] for layer in known]
        rows = iter(torch.stack(values).cpu() if values else ())
        scales = {layer: next(rows) for layer in layers}
        if known:
            self.ratios = {layer: next(rows) for layer in known}
        even = {layer: torch.ones_like(scale) for layer, scale in scales.items()}
        added = sum(block.plan_inverse_segments(scales, {**even, **self.ratios}) for block in self.blocks)
        total = torch.tensor(added, device=self.device)
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        self.added = int(total)

    def ratios_of_all_stages(self) -> list[list[float]]:
        """By layer of the whole model, [] where none is known; a collective call."""
        stages: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
        own = {layer: ratios.tolist() for layer, ratios in self.ratios.items()}
        dist.all_gather_object(stages, own, group=parallel_state.get_pipeline_model_parallel_group())
        known = {layer: values for stage in stages for layer, values in stage.items()}
        return [known.get(layer, []) for layer in range(self.blocks[0].config.num_layers)]

    def restore(self, ratios: Sequence[Sequence[float]]) -> None:
        """Go by what `ratios_of_all_stages` has given, in this layout or another one.

        Raises:
            ValueError: it has another form.
        """
        config = self.blocks[0].config
        found = [torch.tensor(values, dtype=torch.float32) for values in ratios]
        if len(found) != config.num_layers or any(
            x.shape not in ((0,), (len(config.table.architecture.names),)) for x in found
        ):
            raise ValueError(f"norm_ratios must have one list for each of {config.num_layers} layers")
        here = [layer for block in self.blocks for layer in block.layer_range]
        self.ratios = {layer: found[layer] for layer in here if len(found[layer])}
        self.is_calibrated = any(len(x) for x in found)


def _scales_by_layer(betas: dict[LowRankGroup, Tensor]) -> dict[int, Tensor]:
    """s(beta) of every position by layer (from 0)."""
    found: dict[int, list[Tensor]] = {}
    for group, beta in betas.items():
        found.setdefault(group.layer, []).append(signed_scale(beta.float(), group.config.cross_layer_epsilon))
    return {layer: torch.cat(scales) for layer, scales in found.items()}


def _largest_ratios(blocks: Sequence[CRNetTransformerBlock]) -> dict[int, Tensor]:
    recorded: dict[int, Tensor] = {}
    for block in blocks:
        recorded.update(block.norm_ratios)
        block.norm_ratios.clear()
    if not recorded:
        return {}
    # NaN must not get lost in a maximum, and JSON has neither
    largest = torch.finfo(torch.float32).max
    ratios = torch.stack([recorded[layer] for layer in sorted(recorded)]).nan_to_num(nan=largest, posinf=largest)
    dist.all_reduce(ratios, op=dist.ReduceOp.MAX, group=parallel_state.get_tensor_and_data_parallel_group())
    return dict(zip(sorted(recorded), ratios, strict=True))
