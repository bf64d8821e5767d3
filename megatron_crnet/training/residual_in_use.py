"""Who computes a run's cross-layer residual, in words, and whether it was somebody else before the checkpoint.

Kernels and PyTorch's operations round differently, and so may two versions of Triton: a run that changes from one to
the other goes on, but not with the bits that it would have had.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_crnet.config.schema import Config
from megatron_crnet.model.residual import runs_kernels
from megatron_crnet.utils.versions import NOT_INSTALLED, library_versions

PYTORCH = "PyTorch's operations"


def residual_in_use(config: Config, device: torch.device) -> str:
    """What the start of a run says: `Triton 3.7.1's kernels` or `PyTorch's operations`."""
    runs = runs_kernels(device, config.training.cross_layer_fusion)
    return _kernels(library_versions(("triton",))) if runs else PYTORCH


def saved_residual(saved: dict[str, Any], versions: dict[str, str]) -> str:
    """The same of the run that wrote a checkpoint, if it ran on CUDA.

    Args:
        saved: its resolved configuration; without `cross_layer_fusion` where it is older than the kernels.
        versions: of its libraries.
    """
    fusion = saved.get("training", {}).get("cross_layer_fusion", False)
    return _kernels(versions) if fusion and versions.get("triton") != NOT_INSTALLED else PYTORCH


def changed_residual(
    config: Config, device: torch.device, saved: dict[str, Any], versions: dict[str, str]
) -> str | None:
    """A line of warning where the residual rounds otherwise than before the checkpoint, else None.

    On CPUs nothing changes: they have one residual.
    """
    before, now = saved_residual(saved, versions), residual_in_use(config, device)
    if config.model.variant != "crnet" or device.type != "cuda" or before == now:
        return None
    return (
        f"the residual was computed by {before} until the checkpoint and is by {now} from here, which round "
        "differently: the losses are the same to rounding, not to the bit"
    )


def _kernels(versions: dict[str, str]) -> str:
    return f"Triton {versions.get('triton', '(of a version that nobody noted)')}'s kernels"
