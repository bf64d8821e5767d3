"""Rows of layouts, which are compared with the plain reference one after another in one spawn of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from megatron_crnet.config.schema import Config
from tests.distributed.spawn import fresh_world
from tests.helpers import Errors, compare_with_reference

FP32_BOUND = 1e-5
# see test_zero.py
BF16_BOUNDS = Errors(loss=1e-2, grad_norm=5e-2, gradients=0.4, parameters=3e-2)


@dataclass(frozen=True)
class Sizes:
    """Sizes of every kind of parallelism, ZeRO stage, and what the model looks like."""

    tp: int = 1
    sp: bool | None = None
    pp: int = 1
    vpp: int = 1
    zero: int = 0
    dtype: str = "fp32"
    model: dict[str, Any] = field(default_factory=dict, hash=False)
    keys: dict[str, Any] = field(default_factory=dict, hash=False)
    data: dict[str, Any] = field(default_factory=dict, hash=False)
    sequences: int = 8

    @property
    def parallel_section(self) -> dict[str, Any]:
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vpp,
            "sequence_parallel": self.sp,
        }

    @property
    def deepspeed_section(self) -> dict[str, Any]:
        return {"zero_optimization": {"stage": self.zero, **self.keys}}


AnySizes = TypeVar("AnySizes", bound=Sizes)


def shortened(rows: Iterable[AnySizes]) -> list[AnySizes]:
    """Rows for two ranks, with two micro-batches instead of four where these are one replica without a pipeline."""
    return [replace(row, sequences=4) if row.tp == 2 and row.pp == 1 else row for row in rows]


class Row(Protocol):
    def config(self) -> Config: ...


def measure(rows: Sequence[Row], steps: int = 3) -> list[Errors]:
    """Errors of each row; a collective call."""
    found = []
    for row in rows:
        try:
            found.append(compare_with_reference(row.config(), steps))
        except Exception as error:
            raise RuntimeError(f"row {row}") from error
        fresh_world()
    return found


def check(dtype: str, errors: Errors, fp32: float = FP32_BOUND, bf16: Errors = BF16_BOUNDS) -> None:
    if dtype == "fp32":
        assert errors.worst() < fp32, errors
        return
    for name in ("loss", "grad_norm", "gradients", "parameters"):
        assert getattr(errors, name) < getattr(bf16, name), errors
