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


class _RootMeanSquare(torch.autograd.Function):
    """x / rms(x) * weight in fp32, keeping what CUDA's kernel keeps: the input and 1 / rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normed, grad = x.float() * inverse, grads[0].float()
        grad_weight = (grad * normed).sum(tuple(range(x.dim() - 1)))
        grad = grad * weight.float()
        grad_x = (grad - normed * (grad * normed).mean(-1, keepdim=True)).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class LeanRMSNorm(nn.RMSNorm):
    """PyTorch's RMSNorm; outside CUDA, where PyTorch composes it and keeps three fp32 copies, one function."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width]."""
        if x.is_cuda:
            return super().forward(x)
        return _RootMeanSquare.apply(x, self.weight, self.eps)


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
        norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[union-attr]
        return norm
