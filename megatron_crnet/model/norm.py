"""RMSNorm and LayerNorm by our regions; RMSNorm of Transformer Engine or Apex where regions are not compiled on CUDA.

`WrappedTorchNorm` of Megatron-Core refuses sequence parallelism; here the weights are marked, so that their
gradients, partial sums over the sequence shard, are reduced with the other marked ones.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from megatron_crnet.config.megatron import CRNetTransformerConfig
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
        except Exception:  # absent, not NVIDIA's apex, built for another CUDA, or half installed: it raises anything
            continue
    return None


class LeanNorm(nn.Module):
    """A norm by the region of `model/glue.py`, which keeps x and what it computes of each row."""

    glue: Glue = EAGER

    def forward(self, x: Tensor, with_stream: bool = False) -> Any:
        """The norm of x, [..., width].

        Args:
            with_stream: return also x to go on with: backward adds both gradients where it computes the first.
        """
        weights = [weight for weight in (self.weight, getattr(self, "bias", None)) if weight is not None]
        normed, stream = Norm.apply(self.glue, x, *weights, self.eps)
        return (normed, stream) if with_stream else normed


class LeanRMSNorm(LeanNorm, nn.RMSNorm):
    """RMSNorm."""


class LeanLayerNorm(LeanNorm, nn.LayerNorm):
    """LayerNorm."""


class CRNetNorm:
    """Makes a norm over the last dimension; a class, because Megatron-Core's specs build only classes."""

    def __new__(cls, config: CRNetTransformerConfig, hidden_size: int, eps: float = 1e-6) -> nn.Module:  # type: ignore[misc]
        """The architecture's norm of width `hidden_size`, in the configuration's dtype, on its device."""
        if config.table.architecture.norm == "rms":
            lean = lean_rms_norm(config, hidden_size, eps, is_partial=config.sequence_parallel)
            # a compiled region also adds the stream's gradient; fake tensors know no foreign kernels
            fused = None if lean.glue is not EAGER or isinstance(lean.weight, FakeTensor) else fused_norm_class()
            if fused is None:
                return lean
            norm = fused(hidden_size, eps=eps).to(dtype=config.params_dtype, device=config.initial_device)
        else:
            norm = LeanLayerNorm(hidden_size, eps, dtype=config.params_dtype, device=config.initial_device)
            norm.glue = choose_glue(norm.weight, config.cross_layer_fusion)
        return _marked(norm, config.sequence_parallel)


def lean_rms_norm(config: CRNetTransformerConfig, width: int, eps: float, *, is_partial: bool) -> LeanRMSNorm:
    """An RMSNorm.

    Args:
        is_partial: its gradient is a partial sum over tensor-parallel ranks.
    """
    norm = LeanRMSNorm(width, eps=eps, dtype=config.params_dtype, device=config.initial_device)
    norm.glue = choose_glue(norm.weight, config.cross_layer_fusion)
    return _marked(norm, is_partial)


NormModule = TypeVar("NormModule", bound=nn.Module)


def _marked(norm: NormModule, is_partial: bool) -> NormModule:
    for parameter in norm.parameters():
        parameter.sequence_parallel = is_partial  # type: ignore[attr-defined]
    return norm
