"""Core attention on `scaled_dot_product_attention`: causal, grouped-query, no s x s matrix in memory."""

from __future__ import annotations

from contextlib import nullcontext

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_crnet.fragment import Fragment
from megatron_crnet.memory import LayerMemory
from megatron_crnet.transformer_config import CRNetTransformerConfig


class SDPACoreAttention(MegatronModule):
    """Drop-in for Megatron-Core's `DotProductAttention` in a `ModuleSpec`."""

    def __init__(self, config: CRNetTransformerConfig, layer_number: int) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number

    def forward(self, query: Tensor, key: Tensor, value: Tensor, memory: LayerMemory | None = None) -> Tensor:
        """query: [s, b, n, d]; key, value: [s, b, groups, d]. Returns [s, b, n d], causal.

        With `memory`, the forward pass is recorded there, or what was recorded is used (`memory.py`).
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if memory is None:
            (out,) = self._attend(q, k, v)
        elif memory.keep_attention_output:
            out = self._kept(q, k, v, memory)
        else:
            with memory.drawing("attention"):
                (out,) = self._attend(q, k, v)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _kept(self, q: Tensor, k: Tensor, v: Tensor, memory: LayerMemory) -> Tensor:
        if memory.attention is None:
            (out,), memory.attention = Fragment.record(self._attend, q, k, v, keep_outputs=True)
        else:
            (out,) = memory.attention.resume(memory.attention.kept_outputs(), q, k, v)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        dropout = self.config.attention_dropout if self.training else 0.0
        # with sequence parallelism the block has forked already, and the same fork again would draw the same numbers
        forks = dropout > 0 and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if forks else nullcontext():
            return (
                F.scaled_dot_product_attention(
                    q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
                ),
            )
