"""Import what a run needs and print the versions: the health check of the container image.

    %(prog)s && echo complete

Exit status: 0 all of it can be imported, 1 something cannot (Python's own message says what).
"""

from __future__ import annotations

import importlib
import importlib.util

from megatron_crnet.cli.main import Call
from megatron_crnet.config.options import ToolParser

REQUIRED = ("torch", "megatron.core", "deepspeed", "megatron_crnet", "safetensors")
OPTIONAL = ("triton", "apex", "transformer_engine", "flash_attn")


def build_parser(prog: str) -> ToolParser:
    """No options."""
    return ToolParser(prog=prog, description=__doc__)


def run(call: Call) -> int:
    """Import and print; returns the exit status."""
    build_parser(call.prog).parse_args(call.argv)
    from megatron_crnet.distributed import cpu_backend

    cpu_backend.install()  # before Megatron-Core and DeepSpeed, as in a run
    versions = [f"{name} {importlib.import_module(name).__version__}" for name in REQUIRED]
    # these are looked for, not imported: without a GPU's driver some cannot be
    found = [f"{name} {'found' if importlib.util.find_spec(name) else 'absent'}" for name in OPTIONAL]
    print(", ".join((*versions, *found)))
    return 0
