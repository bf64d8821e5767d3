"""The cross-layer residual Y_l = s(beta_l) Y_{l-1} + Z_l B_l: forward, backward and inverse, element by element.

Every function computes in fp32 whatever the storage is. They are plain functions, because one autograd function
(`model/lowrank.py`) holds them together with the products that they follow. Where Triton and CUDA are, kernels that
pass over memory once take their place (`model/residual_kernels.py`).
"""

from __future__ import annotations

import subprocess
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, bfloat16, dot, float32
from torch._subclasses import FakeTensor

from megatron_crnet.utils.errors import ConfigError, CrnetError, require


def signed_scale(beta: Tensor, eps: float) -> Tensor:
    """s(b) = sign(b)(|b| + eps) with sign(0) = +1, so that it can always be inverted; ds/db = 1."""
    return torch.where(beta < 0, beta - eps, beta + eps)


def add_previous(update: Tensor, previous: Tensor, scale: Tensor) -> Tensor:
    """s Y_{l-1} + update.

    Args:
        update: z B of this layer, [s, b, w].
        previous: the same position's output in the previous layer, [s, b, w].
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
class ResidualOps:
    """Residual backend: the plain functions, or kernels with the same arguments and meaning."""

    add_previous: Callable[[Tensor, Tensor, Tensor], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    remove_update: Callable[[Tensor, Tensor, Tensor], Tensor]


EAGER = ResidualOps(add_previous, gradients, remove_update)


def runs_kernels(device: torch.device, fusion: bool) -> bool:
    """Whether the kernels compute the residual on this device: they are wanted, and Triton is there.

    Args:
        fusion: `training.cross_layer_fusion`.
    """
    return fusion and device.type == "cuda" and find_spec("triton") is not None


def choose_residual(weight: Tensor, fusion: bool, widths: Iterable[int]) -> ResidualOps:
    """The kernels where they are wanted and `weight` lives where they run, else the plain functions.

    A group of linear maps asks once, when it is built: the two round differently, and a rebuilt output must be the
    forward pass's to the bit.

    Args:
        weight: a parameter of the group.
        fusion: `training.cross_layer_fusion`.
        widths: of the group's outputs on this rank.

    Raises:
        ConfigError, CrnetError: Triton is there, but does not work (`working_kernels`).
    """
    real = weight.dtype in (float32, bfloat16) and not isinstance(weight, FakeTensor)
    if not real or not runs_kernels(weight.device, fusion):
        return EAGER
    (kernels,) = {working_kernels(weight.device, weight.dtype, width) for width in widths}
    return kernels


@cache
def working_kernels(device: torch.device, dtype: torch.dtype, width: int) -> ResidualOps:
    """The kernels, after a try on this device: Triton needs a C compiler, a driver and a folder that it may write.

    Raises:
        ConfigError: they cannot be compiled or started, or give other numbers than the plain functions.
        CrnetError: the folder for what is compiled cannot be read or written.
        torch.OutOfMemoryError, torch.AcceleratorError, RuntimeError: the device is full or broken.
    """
    switch = "set training.cross_layer_fusion false"
    try:
        from megatron_crnet.model import residual_kernels as kernels

        fused = ResidualOps(kernels.add_previous, kernels.gradients, kernels.remove_update)
        agrees = all(_agrees(fused, device, dtype, (rows, width)) for rows in _tried_rows(width))
    except (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError):
        raise
    except Exception as error:  # whatever Triton, the C compiler or the driver raise
        if "Triton Error [CUDA]: out of memory" in str(error):
            raise
        lines = str(error).strip().splitlines() or [""]
        what = f"({type(error).__name__}: {lines[0]})"
        if isinstance(error, OSError) and not _starts_no_program(error):
            raise CrnetError(
                f"Triton cannot read or write its folder of compiled kernels {what}: mend that disk, set "
                f"TRITON_CACHE_DIR to a local one, or {switch}"
            ) from error
        raise ConfigError(
            f"training.cross_layer_fusion is true, but Triton does not work here {what}: mend it, or {switch}"
        ) from error
    require(agrees, f"training.cross_layer_fusion is true, but Triton computes wrong numbers on {device}: {switch}")
    return fused


def _starts_no_program(error: OSError) -> bool:
    """Whether a program is missing, such as the C compiler that CC names."""
    places = traceback.extract_tb(error.__traceback__)
    from_starting = bool(places) and places[-1].filename == subprocess.__file__
    return from_starting and isinstance(error, FileNotFoundError | PermissionError)


def _tried_rows(width: int) -> tuple[int, int]:
    """Numbers of rows of this width for which all that a run needs is compiled.

    Where 16 does not divide the width, Triton compiles one variant for multiples of 16 rows, as nearly all training
    has, and one for others, such as a prompt's. Both fill the largest tile, as real inputs do.
    """
    many = 16 * -(-64 // width)
    return many, many + 1


def _agrees(fused: ResidualOps, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> bool:
    """Whether the kernels give the plain functions' results on inputs of this shape, [rows, width]."""
    values = torch.linspace(-2.0, 2.0, shape[0] * shape[1], device=device).view(shape)
    y, u, scale = values.to(dtype), (values + 0.5).to(dtype), torch.tensor(0.75, device=device)
    output, grad, _, previous = _results(EAGER, u, y, scale)
    # of so many terms, fp32 sums in two orders may differ by more than the bound
    wanted = [output, grad, dot(u.double().flatten(), y.double().flatten()).float(), previous]
    if device.type == "cuda":
        # what went wrong on the device before is not to be taken for Triton's fault
        torch.cuda.synchronize(device)
    rounding = {bfloat16: 2**-7, float32: 1e-5}
    pairs = zip(_results(fused, u, y, scale), wanted, strict=True)
    return all(torch.allclose(x, y, rtol=rounding[y.dtype], atol=rounding[y.dtype]) for x, y in pairs)


def _results(residual: ResidualOps, u: Tensor, y: Tensor, scale: Tensor) -> list[Tensor]:
    return [
        residual.add_previous(u, y, scale),
        *residual.gradients(u, y, scale),
        residual.remove_update(y, u, scale),
    ]
