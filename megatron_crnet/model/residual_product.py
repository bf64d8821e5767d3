"""Y = s(beta) Y_prev + z B^T as one kernel, which takes the residual along where it writes the product.

In two passes (`two_passes`, what it means) s Y_prev is written first and the product added in place: Y is written twice
and read once more than here. The kernel also rounds once, the two passes twice.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from megatron_crnet.model.compiled import SWITCH, compiles
from megatron_crnet.model.glue import scaled, signed_scale
from megatron_crnet.utils.errors import ConfigError, describe, require

ResidualProduct = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""From z [rows, r], B [w, r], Y_prev [.., w] of as many rows, beta (a scalar in fp32) and eps to Y, as Y_prev."""

ALIGNED = 16
"""Bytes: what TMA reads begins at multiples of it, in every row."""
CAPABILITIES = (9, 0), (10, 0)
"""Hopper, on which it has been tried: the first, and the first after them."""


def two_passes(z: Tensor, b: Tensor, previous: Tensor, beta: Tensor, eps: float) -> Tensor:
    """s(beta) Y_prev + z B^T by PyTorch."""
    (y,) = scaled((previous,), beta.view(1), eps)
    y = y.contiguous()
    y.view(-1, b.shape[0]).addmm_(z, b.t())
    return y


def suits(dtype: torch.dtype, shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether the kernel is for matrices B of this dtype and these shapes [.., w, r]."""
    return dtype == torch.bfloat16 and all(n * dtype.itemsize % ALIGNED == 0 for shape in shapes for n in shape[-2:])


def choose_residual(weight: Tensor, shapes: Iterable[tuple[int, ...]], fusion: bool) -> ResidualProduct | None:
    """The kernel where compiled regions are wanted and it is for this device and these B; None: in two passes.

    Args:
        weight: of the dtype and on the device of the layer.
        shapes: see `suits`.
        fusion: `training.cross_layer_fusion`.

    Raises:
        ConfigError: the kernel does not run, or gives other numbers than the two passes.
    """
    if isinstance(weight, FakeTensor) or not compiles(weight.device, fusion) or not suits(weight.dtype, shapes):
        return None
    first, after = CAPABILITIES
    is_known = torch.version.hip is None and first <= torch.cuda.get_device_capability(weight.device) < after
    return working_residual(weight.device) if is_known else None


@cache
def working_residual(device: torch.device) -> ResidualProduct:
    """The kernel, after a try on this device.

    Raises:
        ConfigError: as `choose_residual`.
        torch.OutOfMemoryError, torch.AcceleratorError: the device is full or broken.
    """
    programs = torch.cuda.get_device_properties(device).multi_processor_count

    def residual_product(z: Tensor, b: Tensor, previous: Tensor, beta: Tensor, eps: float) -> Tensor:
        if is_in_torch_dispatch_mode():  # operations are counted, as `model/compiled.py` says
            return two_passes(z, b, previous, beta, eps)
        return by_kernel(z, b, previous, beta, eps, programs)

    from triton.errors import TritonError

    try:
        # so many rows that a program gets a second tile
        agrees = is_right(residual_product, device, rows=64 * programs + 100)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{_KERNEL} does not run on {device} ({describe(error)}): {SWITCH}") from error
    require(agrees, f"{_KERNEL} gives other numbers on {device}: {SWITCH}")
    return residual_product


_KERNEL = "training.cross_layer_fusion is true, but the kernel that adds the residual to a product"


def by_kernel(z: Tensor, b: Tensor, previous: Tensor, beta: Tensor, eps: float, programs: int) -> Tensor:
    """As `ResidualProduct`, on as many processors.

    What the kernel cannot read where it lies, such as a B in the middle of an optimizer's flat buffer, is copied: so
    the kernel is the same wherever a tensor lies.
    """
    from megatron_crnet.model.residual_kernel import launch

    rows = previous.reshape(-1, previous.shape[-1])
    out = launch(readable(z), readable(b.contiguous()), readable(rows), beta, eps, programs)
    return out.view(previous.shape)


def readable(x: Tensor) -> Tensor:
    """The matrix x, copied unless its rows are contiguous and begin at multiples of `ALIGNED` bytes."""
    places = x.data_ptr(), x.stride(0) * x.element_size()
    if x.stride(1) == 1 and all(place % ALIGNED == 0 for place in places):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def is_right(product: ResidualProduct, device: torch.device, rows: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether a product is that of fp32 to rounding: with edges, several tiles and slices of wider rows."""
    width, rank, eps = 328, 72, 1e-6
    values = torch.arange(rows * 2 * width, device=device).mul_(37).remainder_(101).sub_(50) / 50
    wide = values.view(rows, 2 * width).to(dtype)
    z, previous = wide[:, rank : 2 * rank], wide[:, width:]
    b = wide.flatten()[-width * rank :].view(width, rank) * rank**-0.5
    for number in (0.5, -1.5):
        beta = torch.tensor(number, device=device).float()  # whatever the default dtype is
        wanted = signed_scale(beta, eps) * previous.float() + z.float() @ b.float().t()
        if not torch.allclose(product(z, b, previous, beta, eps).float(), wanted, rtol=2**-7, atol=2**-7):
            return False
    return True
