"""The cross-layer residual Y_l = s(beta_l) Y_{l-1} + Z_l B_l: forward, backward and inverse, element by element.

Every function computes in fp32 whatever the storage is. They are plain functions, because one autograd function
(`low_rank_products.py`) holds them together with the products that they follow. Where Triton and CUDA are, kernels that
pass over memory once take their place (`cross_layer_kernels.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, bfloat16, dot, float32
from torch._subclasses import FakeTensor

from megatron_crnet.errors import ConfigError, require


def add_previous(update: Tensor, previous: Tensor, scale: Tensor) -> Tensor:
    """s Y_{l-1} + update.

    Args:
        update: z B of this layer, [s, b, w].
        previous: the same position's output one layer below, [s, b, w].
        scale: s(beta), a scalar in fp32 whatever the other dtypes are.
    """
    if update.dtype == float32:
        return update.addcmul(previous, scale)
    return update.float().addcmul_(previous.float(), scale).to(update.dtype)


def gradients(grad: Tensor, previous: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of Y_{l-1} and (in fp32) of beta; that of the update is `grad` itself."""
    wide = grad.float()
    # ds/db = 1, so beta's gradient is the inner product of the output's gradient and Y_{l-1}
    grad_beta = dot(wide.flatten(), previous.float().flatten())
    return (wide * scale).to(grad.dtype), grad_beta


def remove_update(output: Tensor, update: Tensor, scale: Tensor) -> Tensor:
    """Y_{l-1} = (Y_l - update) / s, to rounding: what `add_previous` rounded off comes back divided by s."""
    if output.dtype == float32:
        return output.sub(update).div_(scale)
    return output.float().sub_(update.float()).div_(scale).to(output.dtype)


@dataclass(frozen=True)
class Residual:
    """Who computes the residual: the plain functions, or kernels with the same arguments and meaning."""

    add_previous: Callable[[Tensor, Tensor, Tensor], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    remove_update: Callable[[Tensor, Tensor, Tensor], Tensor]


PLAIN = Residual(add_previous, gradients, remove_update)


def choose_residual(weight: Tensor, fusion: bool) -> Residual:
    """The kernels where they are wanted and `weight` lives where they run, else the plain functions.

    A group of linear maps asks once, when it is built: the two round differently, and a rebuilt output must be the
    forward pass's to the bit.

    Args:
        weight: a parameter of the group.
        fusion: `training.cross_layer_fusion`.

    Raises:
        ConfigError: Triton is there, but does not work.
    """
    runs = weight.is_cuda and weight.dtype in (float32, bfloat16) and not isinstance(weight, FakeTensor)
    if not fusion or not runs or find_spec("triton") is None:
        return PLAIN
    return working_kernels(weight.device, weight.dtype)


@cache
def working_kernels(device: torch.device, dtype: torch.dtype) -> Residual:
    """The kernels, after a try on this device: Triton needs a C compiler, a driver and a folder that it may write.

    Raises:
        ConfigError: they cannot be compiled or started, or give other numbers than the plain functions.
    """
    switch = "set training.cross_layer_fusion false"
    try:
        from megatron_crnet import cross_layer_kernels as kernels

        fused = Residual(kernels.add_previous, kernels.gradients, kernels.remove_update)
        agrees = _agrees(fused, device, dtype)
    except Exception as error:  # whatever Triton, the C compiler or the driver raise
        lines = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"training.cross_layer_fusion is true, but Triton does not work here ({type(error).__name__}: {lines[0]}): "
            f"mend it, or {switch}"
        ) from error
    require(agrees, f"training.cross_layer_fusion is true, but Triton computes wrong numbers on {device}: {switch}")
    return fused


def _agrees(fused: Residual, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a few rows give the plain functions' results; the width is one whose variant wide models use."""
    values = torch.linspace(-2.0, 2.0, 3 * 1040, device=device).view(3, 1040)
    y, u, scale = values.to(dtype), (values + 0.5).to(dtype), torch.tensor(0.75, device=device)
    pairs = zip(_results(fused, u, y, scale), _results(PLAIN, u, y, scale), strict=True)
    rounding = {bfloat16: 2**-7, float32: 1e-5}
    return all(torch.allclose(x, y, rtol=rounding[y.dtype], atol=rounding[y.dtype]) for x, y in pairs)


def _results(residual: Residual, u: Tensor, y: Tensor, scale: Tensor) -> list[Tensor]:
    return [
        residual.add_previous(u, y, scale),
        *residual.gradients(u, y, scale),
        residual.remove_update(y, u, scale),
    ]
