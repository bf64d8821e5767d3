"""Import what a run needs and print the versions: the health check of the container image.

    python tools/check_imports.py

Exit status: 0 all of it can be imported, 1 something cannot (Python's own message says what).
"""

from __future__ import annotations

from megatron_crnet.utils.errors import ctrl_c_is_one_line

if __name__ == "__main__":
    ctrl_c_is_one_line()  # during the imports below as well

import importlib
import importlib.util
import sys

REQUIRED = ("torch", "megatron.core", "deepspeed", "megatron_crnet", "safetensors")
OPTIONAL = ("triton", "apex", "transformer_engine", "flash_attn")


def main() -> int:
    """Run; returns the exit status."""
    from megatron_crnet.distributed import cpu_backend

    cpu_backend.install()  # before Megatron-Core and DeepSpeed, as in a run
    versions = [f"{name} {importlib.import_module(name).__version__}" for name in REQUIRED]
    # these are looked for, not imported: without a GPU's driver some cannot be
    found = [f"{name} {'found' if importlib.util.find_spec(name) else 'absent'}" for name in OPTIONAL]
    print(", ".join((*versions, *found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
