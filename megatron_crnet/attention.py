"""Core attention on `scaled_dot_product_attention`: causal, grouped-query, no s x s matrix in memory."""

from __future__ import annotations

from contextlib import nullcontext

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_crnet.transformer_config import CRNetTransformerConfig


class SDPACoreAttention(MegatronModule):
    """Drop-in for Megatron-Core's `DotProductAttention` in a `ModuleSpec`."""

    def __init__(self, config: CRNetTransformerConfig, layer_number: int) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [s, b, n, d]; key, value: [s, b, groups, d]. Returns [s, b, n d], causal."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.config.attention_dropout if self.training else 0.0
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout > 0 else nullcontext():
            out = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )
        return out.permute(2, 0, 1, 3).flatten(2)
