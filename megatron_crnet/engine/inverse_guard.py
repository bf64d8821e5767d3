"""Segments of recomputation by division: from the betas and the norms of the outputs, agreed over ranks.

`inverse` divides an output's error by s(beta) at each layer; relative to the previous layer's output, it also grows by
|Y_l| / |Y_{l-1}|. Both change with training, so segments are planned after each update (docs/recomputation.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_crnet.model.block import CRNetTransformerBlock
from megatron_crnet.model.glue import signed_scale
from megatron_crnet.model.linear import LowRankGroup


def plan_inverse_segments(
    blocks: Sequence[CRNetTransformerBlock], betas: dict[LowRankGroup, Tensor], device: torch.device
) -> int:
    """Plan each block's segments by the betas and the norm ratios that its passes have recorded; a collective call.

    The largest ratio over the tensor- and data-parallel ranks of this stage counts, so that all of them invert the
    same layers and every rank's own shard stays within the tolerance. A ratio that was not recorded counts as 1.

    Args:
        betas: the exact beta of each group with a residual.
        device: where this rank computes.

    Returns:
        Number of checkpoints that the guard has added on all pipeline stages.
    """
    scales, ratios = _scales_by_layer(betas), _largest_ratios(blocks)
    layers, recorded = sorted(scales), [layer for layer in sorted(scales) if layer in ratios]
    # one transfer to the host
    values = [scales[layer] for layer in layers] + [ratios[layer] for layer in recorded]
    rows = iter(torch.stack(values).cpu() if values else ())
    scales, ratios = {layer: next(rows) for layer in layers}, {layer: next(rows) for layer in recorded}
    even = {layer: torch.ones_like(scale) for layer, scale in scales.items()}
    added = sum(block.plan_inverse_segments(scales, {**even, **ratios}) for block in blocks)
    total = torch.tensor(added, device=device)
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return int(total)


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
    # NaN must not get lost in a maximum
    ratios = torch.stack([recorded[layer] for layer in sorted(recorded)]).nan_to_num(nan=torch.inf)
    dist.all_reduce(ratios, op=dist.ReduceOp.MAX, group=parallel_state.get_tensor_and_data_parallel_group())
    return dict(zip(sorted(recorded), ratios, strict=True))
