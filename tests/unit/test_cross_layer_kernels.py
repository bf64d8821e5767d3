"""The kernels without a GPU: run by Triton's interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from megatron_crnet.cross_layer import PLAIN, choose_residual, working_kernels
from megatron_crnet.errors import ConfigError

triton = pytest.importorskip("triton", reason="Triton has no build for this machine")
ROOT = Path(__file__).parents[2]
THREADS, ELEMENT = 128, {"bf16": 2, "fp32": 4}


def run_checks(**environment: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/unit/cross_layer_kernel_checks.py",
    ]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_check_holds_in_tritons_interpreter() -> None:
    # GPUs are hidden, so that the interpreter is tried on machines that have some, too
    assert re.search(r"\d\d passed", run_checks(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""))


@pytest.mark.gpu
def test_every_check_holds_on_a_gpu() -> None:
    assert re.search(r"\d\d passed", run_checks(TRITON_INTERPRET="0"))


@pytest.fixture(autouse=True)
def compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(name: str, dtype: str, capability: int, width: int) -> Any:
    """What the launch of a kernel on contiguous rows of this width makes Triton compile."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_crnet import cross_layer_kernels

    kernel = getattr(cross_layer_kernels, name)
    _, tile_rows, tile_columns = cross_layer_kernels._tiles(torch.Size((64, width)))
    lengths = {argument for argument in kernel.arg_names if argument.endswith("stride") or argument == "width"}
    constants = {"tile_rows": tile_rows, "tile_columns": tile_columns}
    if width == 1:
        constants |= dict.fromkeys(lengths, 1)
    types = {"scale": "*fp32", "partial_sums": "*fp32", "rows": "i32", **dict.fromkeys(lengths, "i32")}
    signature = {n: "constexpr" if n in constants else types.get(n, f"*{dtype}") for n in kernel.arg_names}
    even = set(kernel.arg_names) - {*constants, "rows", "scale"} - (lengths if width % 16 else set())
    hints = {(index,): [["tt.divisibility", 16]] for index, n in enumerate(kernel.arg_names) if n in even}
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm


def bytes_of(instruction: str, code: str) -> tuple[float, int]:
    """Bytes an element moved by instructions of 16 bytes a thread, and the number of other ones."""
    found = re.findall(rf"\b{instruction}\.global(?:\.v(\d))?\.b(\d+)", code)
    sizes = [int(count or 1) * int(bits) // 8 for count, bits in found]
    return sum(size for size in sizes if size == 16) * THREADS / 1024, sum(size != 16 for size in sizes)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "partial_sums"), [("add_previous_kernel", 0), ("gradients_kernel", 1), ("remove_update_kernel", 0)]
)
def test_compiled_for_a_gpu_each_input_is_read_once_and_each_output_written_once(
    name: str, partial_sums: int, dtype: str, capability: int
) -> None:
    assembly = compiled(name, dtype, capability, width=4096)
    code = assembly["ptx"]
    assert len(assembly["cubin"]) > 0
    assert bytes_of("ld", code) == (2 * ELEMENT[dtype], 1)  # both inputs, and the scale
    assert bytes_of("st", code) == (ELEMENT[dtype], partial_sums)
    assert ("cvt.rn.bf16x2.f32" in code) == (dtype == "bf16")  # to nearest
    assert not re.search(r"\b(atom|red)\.", code)
    if name == "gradients_kernel":
        # what is outside the tensors must not be added up: both loads say what it counts as
        assert len(re.findall(r"tt\.load %\w+, %\w+, %\w+ ", assembly["ttir"])) == 2
    if name == "add_previous_kernel":
        assert code.count("fma.rn.f32") == 1024 // THREADS
    if name == "remove_update_kernel":
        assert code.count("div.rn.f32") == 1024 // THREADS


@pytest.mark.parametrize("width", [1, 33, 48])
@pytest.mark.parametrize("name", ["add_previous_kernel", "gradients_kernel", "remove_update_kernel"])
def test_narrow_and_odd_rows_compile_too(name: str, width: int) -> None:
    assert len(compiled(name, "bf16", 90, width)["cubin"]) > 0


def test_the_plain_functions_are_chosen_where_kernels_cannot_run_or_are_not_wanted() -> None:
    with FakeTensorMode() as mode:
        fake = torch.nn.Parameter(FakeTensor(mode, torch.empty(2, device="meta"), torch.device("cuda")))
    assert fake.is_cuda
    for weight in (torch.empty(2), torch.empty(2, device="meta"), fake):
        assert choose_residual(weight, fusion=True) is PLAIN


@pytest.mark.gpu
def test_the_kernels_are_chosen_on_a_gpu_unless_switched_off() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.empty(2, dtype=dtype, device="cuda")
        assert choose_residual(weight, fusion=True) is not PLAIN
        assert choose_residual(weight, fusion=False) is PLAIN
    assert choose_residual(torch.empty(2, dtype=torch.float64, device="cuda"), fusion=True) is PLAIN


def test_a_triton_that_does_not_work_is_one_line_with_the_way_out() -> None:
    # a real one: compiled kernels cannot be started on a CPU
    with pytest.raises(ConfigError, match=r"set training\.cross_layer_fusion false$") as caught:
        working_kernels(torch.device("cpu"), torch.float32)
    assert "\n" not in str(caught.value)
