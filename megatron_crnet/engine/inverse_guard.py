"""Where recomputation by division may go down: the betas and the sizes of the outputs, agreed over ranks.

`inverse` divides an output's error by s(beta) at each layer; relative to the output below, it also grows by
|Y_l| / |Y_{l-1}|. Both change with training, so anchors are placed anew after each update (docs/recomputation.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_crnet.model.block import CRNetTransformerBlock
from megatron_crnet.model.linear import LowRankGroup
from megatron_crnet.model.reference import signed_scale


def place_anchors(
    blocks: Sequence[CRNetTransformerBlock], betas: dict[LowRankGroup, Tensor], device: torch.device
) -> int:
    """Cut each block's layers as the betas and the sizes its passes have noted allow; a collective call.

    The largest growth over the tensor- and data-parallel ranks of this stage counts, so that all of them walk down
    the same layers and every rank's own shard stays within the tolerance. Sizes that nobody has noted count as equal.

    Args:
        betas: the exact beta of each group with a residual.
        device: where this rank computes.

    Returns:
        Number of anchors that the guard has added on all pipeline stages.
    """
    scales, growth = _scales_by_layer(betas), _largest_growth(blocks)
    layers, noted = sorted(scales), [layer for layer in sorted(scales) if layer in growth]
    # one transfer to the host
    values = [scales[layer] for layer in layers] + [growth[layer] for layer in noted]
    rows = iter(torch.stack(values).cpu() if values else ())
    scales, growth = {layer: next(rows) for layer in layers}, {layer: next(rows) for layer in noted}
    even = {layer: torch.ones_like(scale) for layer, scale in scales.items()}
    added = torch.tensor(sum(block.place_anchors(scales, {**even, **growth}) for block in blocks), device=device)
    dist.all_reduce(added, group=parallel_state.get_pipeline_model_parallel_group())
    return int(added)


def _scales_by_layer(betas: dict[LowRankGroup, Tensor]) -> dict[int, Tensor]:
    """s(beta) of every position by layer (from 0)."""
    found: dict[int, list[Tensor]] = {}
    for group, beta in betas.items():
        found.setdefault(group.layer, []).append(signed_scale(beta.float(), group.config.cross_layer_epsilon))
    return {layer: torch.cat(scales) for layer, scales in found.items()}


def _largest_growth(blocks: Sequence[CRNetTransformerBlock]) -> dict[int, Tensor]:
    noted: dict[int, Tensor] = {}
    for block in blocks:
        noted.update(block.growth)
        block.growth.clear()
    if not noted:
        return {}
    # what is not a number must not get lost in a maximum
    growth = torch.stack([noted[layer] for layer in sorted(noted)]).nan_to_num(nan=torch.inf)
    dist.all_reduce(growth, op=dist.ReduceOp.MAX, group=parallel_state.get_tensor_and_data_parallel_group())
    return dict(zip(sorted(noted), growth, strict=True))
