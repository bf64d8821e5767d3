"""`training.deterministic`: operations on CUDA that give the same bits in each run, at the price of speed.

Without it some of them add in an order that threads decide among themselves: the gradient of the embedding, attention's
backward pass, and NCCL's reductions where it is free to choose an algorithm. CPUs have no such operation here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_crnet.utils.errors import ConfigError

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", (":4096:8", ":16:8")),
    "NCCL_ALGO": ("Ring", ("Ring", "Tree")),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0", ("0",)),
}
"""Variables that the libraries read when they start: the value that is set, and those that are accepted."""


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Inside, operations that have no deterministic form raise; to be entered before CUDA or NCCL is used.

    Attention is left to PyTorch's flash and plain kernels: flash has a deterministic backward pass that this switches
    on, cuDNN's and the memory-efficient ones are not known to.

    Raises:
        ConfigError: a variable of the environment asks for the contrary.
    """
    if not wanted:
        yield
        return
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    for name, (_, accepted) in ENVIRONMENT.items():
        if before[name] not in (None, *accepted):
            raise ConfigError(
                f"training.deterministic is true, but {name} is {before[name]}, with which results may differ from run "
                f"to run: unset it, or set it to {' or '.join(accepted)}"
            )
    enabled = torch.are_deterministic_algorithms_enabled()
    sdp = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    try:
        for name, (value, _) in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        torch.backends.cuda.enable_cudnn_sdp(sdp[0])
        torch.backends.cuda.enable_mem_efficient_sdp(sdp[1])
        for name, value_before in before.items():
            if value_before is None:
                os.environ.pop(name, None)
