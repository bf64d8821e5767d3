from __future__ import annotations

import re
from pathlib import Path

import megatron_crnet

PRIVATE = (
    "averaged_gradients",
    "basic_optimizer",
    r"(bit|bf|fp)16_groups",
    r"ds_(id|numel|process_group|shape|tensor)",
    r"fp32_groups\w*",
    "fp32_partitioned_groups_flat",
    "grad_position",
    r"_?(hp|lp)_(mapping|fragment_address)",
    "ipg_buckets",
    "single_partition_of_fp32_groups",
    "_reassign_or_swap_out_partitioned_parameters",
    r"safe_(get|set)_full_\w+",
)
"""Names of DeepSpeed's buffers, and of functions that look into them."""


def test_only_one_file_names_deepspeeds_private_buffers() -> None:
    package = Path(megatron_crnet.__file__).parent
    named = re.compile(rf"\b({'|'.join(PRIVATE)})\b")
    files = {str(file.relative_to(package)) for file in package.rglob("*.py") if named.search(file.read_text("utf-8"))}
    assert files == {"engine/zero.py"}
