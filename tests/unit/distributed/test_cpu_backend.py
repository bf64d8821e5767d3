"""What the patches for machines without CUDA leave behind."""

from __future__ import annotations

import torch
from megatron.core import jit


def test_megatrons_fusions_are_plain_functions_and_pytorchs_compiler_is_there_as_before() -> None:
    def double(x: int) -> int:
        return 2 * x

    assert jit.jit_fuser(double) is double
    assert jit.jit_fuser(fullgraph=True)(double) is double
    assert torch.compile.__module__ == "torch"
