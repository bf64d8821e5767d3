"""What the process has imported that ranks and programs are forked from (`forked.py`), and makes no garbage of."""

from __future__ import annotations

import gc
import importlib
import pkgutil

import megatron_crnet
from megatron_crnet.distributed import cpu_backend

# before Megatron-Core is imported, as the entry points do
cpu_backend.install()

# what DeepSpeed imports with its first engine, torch.compile's back end among it, and the trainer with its first use
LATER = (
    "deepspeed.module_inject",
    "deepspeed.moe.utils",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.backends.backend_agg",
    "tests.helpers",
    "torch.utils.tensorboard",
    "transformers",
)
ON_GPUS = "megatron_crnet.model.residual_kernel"  # imports Triton
ours = (module.name for module in pkgutil.walk_packages(megatron_crnet.__path__, "megatron_crnet."))
try:
    for name in (name for name in (*LATER, *ours) if name != ON_GPUS):
        importlib.import_module(name)
except ImportError as error:
    # the fork server passes over an ImportError, and every forked process would then import all of this by itself
    raise RuntimeError(f"what tests are forked from cannot be imported: {error}") from error

# a collection would look at a million objects, and copy their pages in every forked process
gc.collect()
gc.freeze()
