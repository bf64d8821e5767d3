"""What the process that cases are forked from has imported: what takes a process of its own seconds."""

from __future__ import annotations

import importlib
import pkgutil

from megatron_crnet.distributed import cpu_backend

# before Megatron-Core is imported, as the entry points do
cpu_backend.install()

import torch.utils.tensorboard  # noqa: E402, F401
import transformers  # noqa: E402, F401

import megatron_crnet  # noqa: E402

for module in pkgutil.walk_packages(megatron_crnet.__path__, "megatron_crnet."):
    if not module.name.endswith("kernels"):  # needs Triton
        importlib.import_module(module.name)
