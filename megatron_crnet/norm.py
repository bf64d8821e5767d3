"""RMSNorm: Transformer Engine's or Apex's where they are installed, PyTorch's otherwise.

`WrappedTorchNorm` of Megatron-Core refuses sequence parallelism; here the weight is marked, so that its
gradient, a partial sum over the sequence shard, is reduced with the other marked ones.
"""

from __future__ import annotations

import importlib
from functools import cache

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


@cache
def fused_norm_class() -> type[nn.Module] | None:
    """The fused RMSNorm that this machine offers, or None. Needs CUDA."""
    if not torch.cuda.is_available():
        return None
    for module, name in (("transformer_engine.pytorch", "RMSNorm"), ("apex.normalization", "FusedRMSNorm")):
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, OSError, AttributeError):  # absent, not NVIDIA's apex, or built for another CUDA
            continue
    return None


class CRNetNorm:
    """Makes an RMSNorm over the last dimension; a class, because Megatron-Core's specs build only classes."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> nn.Module:  # type: ignore[misc]
        """The norm of width `hidden_size`, in the configuration's dtype, on its device."""
        norm = (fused_norm_class() or nn.RMSNorm)(hidden_size, eps=eps)
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        norm = norm.to(dtype=config.params_dtype, device=device)
        norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[union-attr]
        return norm
