"""Silences messages of libraries that a user can do nothing about, each by its words; all others are shown."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial

WARNINGS = (
    # optional packages, taken where they are installed
    r".*(Transformer Engine|Apex).*not installed.*",
    # Megatron-Core's and PyTorch's notes to their own developers
    r"full scope is deprecated",
    r".*is deprecated. Please use",
    # a checkpoint is read by each rank for itself, as intended (checkpoint/storage.py)
    r"torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single process",
    # DeepSpeed compares addresses of tensors, which fake ones do not have; a simulation needs no values
    r"Accessing the data pointer of FakeTensor is deprecated",
    # distributed/process_groups.py sets it where it matters; on CPUs it means nothing
    r"When using sequence parallelism it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
)
LOG_RECORDS = {
    "DeepSpeed": r"Setting accelerator to CPU|ZeRO with an untested optimizer",  # both are meant
    # data/index_cache.py saves them itself
    "megatron.core.datasets.blended_dataset": r"Cannot save the \w+ indexes because path_to_cache is None",
    "megatron.core.datasets.gpt_dataset": r"Unable to save \w+ indexes because path_to_cache is None",
    "torch.distributed.run": r"Setting OMP_NUM_THREADS",  # five lines; the help of `crnet launch` says it
}
"""By logger."""
PRINTED = re.compile(
    r"(begin|end) bf16_ ?optimizer$|(before|after) initializing group \d+$|MA [\d.]+ GB |CPU Virtual Memory: "
)
"""Lines that DeepSpeed's bf16 optimizer prints whatever its level of logging."""


def silence_libraries() -> None:
    """Filter the messages above; imports none of the libraries."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, pattern in LOG_RECORDS.items():
        logging.getLogger(name).addFilter(partial(_differs, pattern))


def _differs(pattern: str, record: logging.LogRecord) -> bool:
    return re.search(pattern, record.getMessage()) is None


@contextmanager
def without_memory_lines() -> Iterator[None]:
    """Drop the lines of `PRINTED` from standard output, which is written at the end of the block."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        lines = printed.getvalue().splitlines(keepends=True)
        sys.stdout.write("".join(line for line in lines if not PRINTED.match(line)))
        sys.stdout.flush()
