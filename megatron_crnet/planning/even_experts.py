"""Experts on tensors without values: each is given as many tokens as any other, which is what estimates assume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_crnet.config.positions import PositionTable


@contextmanager
def even_experts(table: PositionTable) -> Iterator[None]:
    """Within `FakeTensorMode`: give the experts of a rank their share of all tokens; does nothing without experts."""
    if not table.num_experts:
        yield
        return
    with (
        # Megatron-Core keeps a tensor of the first pass in the class
        patch.object(MoEAuxLossAutoScaler, "main_loss_backward_scale", None),
        patch.object(token_dispatcher.MoEAlltoAllTokenDispatcher, "_maybe_dtoh_and_synchronize", _share_tokens),
        patch.object(token_dispatcher, "sort_chunks_by_idxs", _sorted_chunks),
        _Chosen(table.topk, table.num_experts),
    ):
        yield


OF_TOKENS = ("input_splits", "output_splits", "num_global_tokens_per_local_expert")
"""What an all-to-all dispatcher reads on the host: how many of its tokens, k times, are in each part."""


def _share_tokens(dispatcher: Any, point: str, counts: Tensor) -> Tensor:
    """In place of copying these numbers to the host: even ones."""
    if point == dispatcher.cuda_dtoh_point:
        for name in OF_TOKENS:
            shares = getattr(dispatcher, name, None)
            if shares is not None:
                ends = np.arange(shares.numel() + 1) * dispatcher.num_out_tokens // shares.numel()
                setattr(dispatcher, name, np.diff(ends).reshape(shares.shape))
    return counts


def _sorted_chunks(x: Tensor, sizes: np.ndarray, _: Tensor, probs: Tensor | None = None, **__: Any) -> Any:
    """Megatron-Core's function of another name: without values any order will do."""
    return tuple(None if part is None else torch.cat(part.split(sizes.tolist())) for part in (x, probs))


class _Chosen(TorchDispatchMode):
    """Of a mask of tokens by experts, as many are set as an even spread sets; shapes of their products in fp32.

    Without values PyTorch 2.13 knows grouped products in bf16 alone.
    """

    def __init__(self, topk: int, num_experts: int) -> None:
        super().__init__()
        self.topk, self.num_experts = topk, num_experts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.masked_select.default:
            values, mask = args
            return values.new_empty(mask.numel() * self.topk // self.num_experts)
        if func is torch.ops.aten._grouped_mm.default:
            one, other, ends = args
            # of tokens, or for their gradient of weights
            return one.new_empty(
                (*ends.shape, len(one), other.shape[1]) if other.dim() == 2 else (len(one), other.shape[2])
            )
        return func(*args, **(kwargs or {}))
