"""The functions of `model/glue.py` compiled, each as one region that passes over memory once; on CUDA."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, float32
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from megatron_crnet.model.glue import EAGER, Glue
from megatron_crnet.utils.errors import ConfigError, describe, require

RECOMPILE_LIMIT = 256
NOTHING_IN_BETWEEN = {"realize_reads_threshold": 64, "realize_opcount_threshold": 1000}
"""What several results of a region need is computed again for each of them, and not written to memory in fp32."""
SWITCH = "set training.cross_layer_fusion false"


def compiles(device: torch.device, fusion: bool) -> bool:
    """Whether regions are compiled on this device: they are wanted, and Triton is there.

    Args:
        fusion: `training.cross_layer_fusion`.
    """
    return fusion and device.type == "cuda" and find_spec("triton") is not None


def choose_glue(weight: Tensor, fusion: bool) -> Glue:
    """The compiled regions where they are wanted and `weight` lives where they run, else the plain functions.

    Raises:
        ConfigError: they cannot be compiled, or give other numbers than the plain functions.
    """
    if isinstance(weight, FakeTensor) or not compiles(weight.device, fusion):
        return EAGER
    return working_glue(weight.device, weight.dtype)


@cache
def working_glue(device: torch.device, dtype: torch.dtype) -> Glue:
    """The compiled regions, after a try of each on this device.

    Raises:
        ConfigError: as `choose_glue`.
        torch.OutOfMemoryError, torch.AcceleratorError: the device is full or broken.
    """
    glue = EAGER.map(lambda _, function: compiled(function))
    # twice, as some functions overwrite their inputs, which are compared as well
    first, second = (trial_inputs(device, dtype) for _ in range(2))
    for name, once in first.items():
        again = second[name]
        wanted = tensors_of((getattr(EAGER, name)(*once), *once))
        found = tensors_of((getattr(glue, name)(*again), *again))
        agrees = all(torch.allclose(x, y, rtol=_bound(x), atol=_bound(x)) for x, y in zip(found, wanted, strict=True))
        require(
            agrees,
            f"training.cross_layer_fusion is true, but {name} compiled on {device} gives other numbers: {SWITCH}",
        )
    return glue


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one region, which raises ConfigError where it cannot be compiled.

    What is compiled follows from shapes and dtypes alone: `dynamic=False`, and no choice between kernels by timing them
    (`deterministic`), so a recomputed tensor meets the kernel that the first one met, on every rank. Casts to bf16 are
    kept, so a value is the same whether it was stored in between. While operations are counted (under a torch dispatch
    mode, where PyTorch refuses to compile) the function runs as it is.
    """
    import torch._dynamo.config
    import torch._inductor.config
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    wanted = {"emulate_precision_casts": True, "compile_threads": 1, "deterministic": True, **NOTHING_IN_BETWEEN}
    options = {name: value for name, value in wanted.items() if hasattr(torch._inductor.config, name)}
    keywords: dict[str, Any] = {"dynamic": False, "fullgraph": True, "options": options}
    # one entry per shape and set of absent arguments; past the limit a call fails. Backward runs in another thread,
    # which since torch 2.12 does not see what is set here for the process
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        keywords["recompile_limit"] = RECOMPILE_LIMIT
    else:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    region = torch.compile(function, **keywords)

    def call(*args: Any) -> Any:
        if is_in_torch_dispatch_mode():
            return function(*args)
        try:
            return region(*args)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (TorchDynamoException, FailOnRecompileLimitHit, OSError) as error:
            raise cannot_compile("training.cross_layer_fusion is true", error, SWITCH) from error

    return call


def cannot_compile(setting: str, error: Exception, otherwise: str) -> ConfigError:
    """What to raise where a setting needs a compiler and that failed."""
    return ConfigError(
        f"{setting}, but torch.compile does not work here ({describe(error)}): mend it (a C compiler, Triton, folders "
        f"in TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR that can be written), or {otherwise}"
    )


def trial_inputs(
    device: torch.device, dtype: torch.dtype, rows: int = 16, heads: int = 4, d: int = 16
) -> dict[str, tuple[Any, ...]]:
    """Arguments for every function of `Glue`, by its name: of two samples of `rows` tokens."""
    values = torch.linspace(-2, 2, rows * 2 * heads * d, device=device).view(rows, 2, heads * d)
    one, other, third = (values.roll(shift).to(dtype) for shift in (0, 7, 23))
    betas, angles = torch.tensor([0.5, -1.5], device=device), torch.linspace(0, 3, rows * d // 2, device=device)
    cos, sin = angles.cos().view(rows, 1, 1, -1), angles.sin().view(rows, 1, 1, -1)
    rows_of, labels = one[:, 0], torch.arange(-2, rows - 2, device=device) * 5
    by_head, weight, inverse = one.unflatten(-1, (heads, d)), values[0, 0].to(dtype), values[..., :1].abs()
    of_heads = values.unflatten(-1, (heads, d))[..., :1].abs()
    return {
        "norm": (one, weight, 1e-5),
        "norm_backward": (one, other, third, weight, inverse),
        "layer_norm": (one, weight, values[1, 0].to(dtype), 1e-5),
        "layer_norm_backward": (one, other, third, weight, weight, values[..., :1].clone(), inverse),
        "rotate": (by_head, cos, sin),
        "rotate_backward": (by_head, cos, sin, other, by_head, betas[0], 1e-6),
        "norm_rotate": (by_head, weight[:d], cos, sin, 1e-5),
        "norm_rotate_backward": (by_head, by_head, weight[:d], of_heads, cos, sin, other, betas[0], 1e-6),
        "swiglu": (one, other),
        "swiglu_backward": (one, other, third, (other, one), betas, 1e-6),
        "gelu": (one, weight),
        "gelu_backward": (one, other, weight, third, betas[0], 1e-6),
        "biased": (one, weight),
        "biased_backward": (one, other, third, betas[0], 1e-6),
        "product": (one, other),
        "product_backward": (one, other, third),
        "add_carried": (one, other, third, betas[0], 1e-6),
        "carried_backward": (one, other, betas[0], 1e-6),
        "scaled": ((one, other), betas, 1e-6),
        "unscaled": ((one, other), betas, 1e-6),
        "exponentials_": (rows_of, labels),
        "logit_gradient_": (rows_of, labels, values[:, 0, 0].abs(), values[:, 0, 1]),
        "accumulate_": (values.flatten(), one.flatten()),
    }


def tensors_of(found: Any) -> list[Tensor]:
    """The tensors of results, in tuples as they come."""
    if isinstance(found, tuple):
        return [x for value in found for x in tensors_of(value)]
    return [found] if isinstance(found, Tensor) else []


def _bound(x: Tensor) -> float:
    return 1e-4 if x.dtype == float32 else 2**-7  # sums over all elements, in another order
