"""What the process that ranks are forked from has imported: what takes a process of its own seconds."""

from __future__ import annotations

from megatron_crnet.distributed import cpu_backend

# before Megatron-Core is imported, as the entry point does
cpu_backend.install()

import tests.distributed.spawn  # noqa: E402
import tests.helpers  # noqa: E402, F401
