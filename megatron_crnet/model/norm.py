"""RMSNorm: Transformer Engine's or Apex's where they are installed, PyTorch's otherwise.

`WrappedTorchNorm` of Megatron-Core refuses sequence parallelism; here the weight is marked, so that its
gradient, a partial sum over the sequence shard, is reduced with the other marked ones.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_crnet.model.compiled import choose_glue
from megatron_crnet.model.glue import EAGER, Glue
from megatron_crnet.model.regions import Norm


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


class LeanRMSNorm(nn.RMSNorm):
    """RMSNorm by the region of `model/glue.py`, which keeps x and 1 / rms(x)."""

    glue: Glue = EAGER

    def forward(self, x: Tensor, with_stream: bool = False) -> Any:
        """The norm of x, [..., width].

        Args:
            with_stream: return also x to go on with: backward adds both gradients where it computes the first.
        """
        normed, stream = Norm.apply(self.glue, x, self.weight, self.eps)
        return (normed, stream) if with_stream else normed


class CRNetNorm:
    """Makes an RMSNorm over the last dimension; a class, because Megatron-Core's specs build only classes."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> nn.Module:  # type: ignore[misc]
        """The norm of width `hidden_size`, in the configuration's dtype, on its device."""
        device = torch.device("cpu" if config.use_cpu_initialization else torch.cuda.current_device())
        fused = fused_norm_class()
        if fused is not None:
            norm = fused(hidden_size, eps=eps).to(dtype=config.params_dtype, device=device)
        else:
            norm = LeanRMSNorm(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
            norm.glue = choose_glue(norm.weight, getattr(config, "cross_layer_fusion", False))
        norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[union-attr]
        return norm
