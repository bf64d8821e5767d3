"""Core attention on `scaled_dot_product_attention`: causal, grouped-query, no s x s matrix in memory.

Within documents (`data/documents.py`) it is one call for each, the same as if that document were alone; a block mask
over whole rows took two to twenty times as long on CPUs (docs/parallelism.md). On CUDA one kernel does all of them
where it can; what it computes is what the calls compute.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from megatron_crnet.config.megatron import CRNetTransformerConfig
from megatron_crnet.data.documents import PackedDocuments
from megatron_crnet.recompute.tape import LayerTape

SAYS_GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Before torch 2.12 the kernel takes grouped heads without being told."""


class SDPACoreAttention(MegatronModule):
    """Drop-in for Megatron-Core's `DotProductAttention` in a `ModuleSpec`."""

    def __init__(self, config: CRNetTransformerConfig, layer_number: int) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tape: LayerTape | None = None,
        documents: PackedDocuments | None = None,
    ) -> Tensor:
        """query: [s, b, n, d]; key, value: [s, b, groups, d]. Returns [s, b, n d], causal.

        With `tape`, the call is recorded there or replayed from there (`recompute/tape.py`). With `documents`, no
        token sees another document.
        """
        inputs = query, key, value
        if documents is None:
            (out,) = self._taped(self._attend, [x.permute(1, 2, 0, 3) for x in inputs], tape)
            return out.permute(2, 0, 1, 3).flatten(2)
        if self._has_kernel(query):
            flat = [x.transpose(0, 1).flatten(0, 1) for x in inputs]
            (out,) = self._taped(partial(self._attend_by_kernel, documents), flat, tape)
            return out.unflatten(0, query.shape[1::-1]).transpose(0, 1).flatten(2)
        parts = [part for x in inputs for part in documents.split(x)]
        return documents.join(self._taped(self._attend, parts, tape)).flatten(2)

    def _taped(
        self, attend: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], tape: LayerTape | None
    ) -> tuple[Tensor, ...]:
        if tape is None:
            return attend(*inputs)
        if tape.attention.saves_graph:
            return tape.attention.call(attend, *inputs, keep_outputs=True)
        with tape.rng_scope("attention"):
            return attend(*inputs)

    @property
    def _dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0

    def _attend(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Causal attention of each document (or row): all queries, then all keys, then all values, [b, heads, s, d]."""
        dropout, count = self._dropout, len(inputs) // 3
        # with sequence parallelism the block has forked already, and the same fork again would draw the same numbers
        forks = dropout > 0 and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if forks else nullcontext():
            return tuple(
                F.scaled_dot_product_attention(
                    q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
                )
                for q, k, v in zip(inputs[:count], inputs[count : 2 * count], inputs[2 * count :], strict=True)
            )

    def _has_kernel(self, query: Tensor) -> bool:
        """Whether one launch can attend within all documents: PyTorch's flash attention of variable length."""
        return (
            query.is_cuda
            and query.dtype in (torch.bfloat16, torch.float16)
            and query.shape[-1] % 8 == 0
            and query.shape[-1] <= 256
            and torch.cuda.get_device_capability(query.device) >= (8, 0)
            and self._dropout == 0
        )

    @staticmethod
    def _attend_by_kernel(documents: PackedDocuments, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        """q, k, v: rows laid end to end, [b s, heads, d]."""
        offsets, longest = documents.offsets, documents.longest
        gqa = q.shape[1] != k.shape[1]
        grouped: dict[str, Any] = {"enable_gqa": gqa} if SAYS_GROUPED else {}
        out = varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0), **grouped)
        assert isinstance(out, Tensor)
        return (out,)
