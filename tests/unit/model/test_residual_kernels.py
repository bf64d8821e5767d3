"""The kernels without a GPU: run by Triton's interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import errno
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from megatron_crnet.model.residual import EAGER, _tried_rows, choose_residual, runs_kernels, working_kernels
from megatron_crnet.utils.errors import ConfigError, CrnetError

triton = pytest.importorskip("triton", reason="Triton has no build for this machine")
ROOT = Path(__file__).parents[3]
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


class Unstarted:
    """Stands where a kernel is started, and notes what Triton would compile for each launch on a GPU of this kind."""

    def __init__(self, kernel: Any, capability: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        self.kernel, self.target, self.launches = kernel, GPUTarget("cuda", capability, 32), []
        self.backend = make_backend(self.target)
        self._bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append(self._bind(*args, **options))

    @property
    def keys(self) -> list[str]:
        """What decides, for each launch, whether Triton compiles anew."""
        return [str((specialization, options)) for _, specialization, options in self.launches]

    def compiled(self) -> Any:
        """What the last launch makes Triton compile."""
        from triton.compiler import ASTSource

        arguments, specialization, launch_options = self.launches[-1]
        options, *source = self.kernel._pack_args(
            self.backend, launch_options, arguments, specialization, launch_options
        )
        return triton.compile(ASTSource(self.kernel, *source), target=self.target, options=options.__dict__).asm


KERNELS = ("add_previous_kernel", "gradients_kernel", "remove_update_kernel")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture
def unstarted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Unstarted]:
    from megatron_crnet.model import residual_kernels

    def replace(name: str, capability: int) -> Unstarted:
        found = Unstarted(getattr(residual_kernels, name), capability)
        monkeypatch.setattr(residual_kernels, name, found)
        return found

    return replace


Replace = Callable[[str, int], Unstarted]


def launch(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
    from megatron_crnet.model import residual_kernels

    getattr(residual_kernels, name.removesuffix("_kernel"))(x, y, torch.tensor([0.0, 0.5])[1])


def compiled(unstarted: Replace, name: str, dtype: str, capability: int, shape: tuple[int, ...]) -> Any:
    kernel, x = unstarted(name, capability), torch.zeros(shape, dtype=DTYPES[dtype])
    launch(name, x, x)
    return kernel.compiled()


def bytes_of(instruction: str, code: str) -> tuple[float, int]:
    """Bytes an element moved by instructions of 16 bytes a thread, and the number of other ones."""
    found = re.findall(rf"\b{instruction}\.global(?:\.v(\d))?\.b(\d+)", code)
    sizes = [int(count or 1) * int(bits) // 8 for count, bits in found]
    return sum(size for size in sizes if size == 16) * THREADS / 1024, sum(size != 16 for size in sizes)


@pytest.mark.parametrize("width", [4096, 5461])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "partial_sums"), zip(KERNELS, [0, 1, 0], strict=True))
def test_compiled_for_a_gpu_each_input_is_read_once_and_each_output_written_once(
    unstarted: Replace, name: str, partial_sums: int, dtype: str, capability: int, width: int
) -> None:
    assembly = compiled(unstarted, name, dtype, capability, (16, 1, width))
    code = assembly["ptx"]
    assert len(assembly["cubin"]) > 0
    assert bytes_of("ld", code) == (2 * ELEMENT[dtype], 1)  # both inputs, and the scale
    assert bytes_of("st", code) == (ELEMENT[dtype], partial_sums)
    assert ("cvt.rn.bf16x2.f32" in code) == (dtype == "bf16")  # to nearest
    assert not re.search(r"\b(atom|red)\.", code)
    if name == "gradients_kernel":
        # what is outside the tensors must not be added up: both loads say what it counts as
        assert len(re.findall(r"tt\.load %\w+, %\w+, %\w+ ", assembly["ttir"])) == 2
    # only where it is written out
    assert code.count("fma.rn.f32") == (1024 // THREADS if name == "add_previous_kernel" else 0)
    assert not re.search(r"\b(fma|mad)\.(?!rn\.f32|lo|wide|hi)", code)
    if name == "remove_update_kernel":
        assert code.count("div.rn.f32") == 1024 // THREADS


@pytest.mark.parametrize("width", [1, 33, 48])
@pytest.mark.parametrize("name", KERNELS)
def test_narrow_and_odd_rows_compile_too(unstarted: Replace, name: str, width: int) -> None:
    assert len(compiled(unstarted, name, "bf16", 90, (3, 5, width))["cubin"]) > 0


@pytest.mark.parametrize("shape", [(6, 2, 48), (6, 1, 48), (6, 2, 33), (16, 1, 33), (2, 2, 1040), (3, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_what_is_compiled_follows_from_shape_and_dtype_alone(
    unstarted: Replace, name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    from tests.unit.cross_layer_kernel_checks import LAYOUTS

    kernel, x = unstarted(name, 90), torch.zeros(shape, dtype=DTYPES[dtype])
    for one, other in itertools.product([x, *(layout(x) for layout in LAYOUTS.values())], repeat=2):
        launch(name, one, other)
    assert len(kernel.launches) == (len(LAYOUTS) + 1) ** 2
    assert len(set(kernel.keys)) == 1


@pytest.mark.parametrize("width", [3, 181, 192, 512, 1040, 5461])
def test_the_try_at_start_up_compiles_all_that_a_run_starts(unstarted: Replace, width: int) -> None:
    kernel, tried = unstarted("gradients_kernel", 90), _tried_rows(width)
    for rows in (*tried, 2048, 2048 + 1, 512 + 7):
        x = torch.zeros(rows, 1, width, dtype=torch.bfloat16)
        launch("gradients_kernel", x, x)
    assert set(kernel.keys[len(tried) :]) == set(kernel.keys[: len(tried)])


def test_the_plain_functions_are_chosen_where_kernels_cannot_run_or_are_not_wanted() -> None:
    with FakeTensorMode() as mode:
        fake = torch.nn.Parameter(FakeTensor(mode, torch.empty(2, device="meta"), torch.device("cuda")))
    assert fake.is_cuda
    for weight in (torch.empty(2), torch.empty(2, device="meta"), fake):
        assert choose_residual(weight, True, [48]) is EAGER


@pytest.mark.gpu
def test_the_kernels_are_chosen_on_a_gpu_unless_switched_off() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.empty(2, dtype=dtype, device="cuda")
        assert choose_residual(weight, True, [48]) is not EAGER
        assert choose_residual(weight, False, [48]) is EAGER
    assert choose_residual(torch.empty(2, dtype=torch.float64, device="cuda"), True, [48]) is EAGER


def test_a_triton_that_does_not_work_is_one_line_with_the_way_out() -> None:
    # a real one: compiled kernels cannot be started on a CPU
    with pytest.raises(ConfigError, match=r"set training\.cross_layer_fusion false$") as caught:
        working_kernels(torch.device("cpu"), torch.float32, 48)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def failing(monkeypatch: pytest.MonkeyPatch, fail: Callable[[], object]) -> Exception:
    """What becomes of an error that comes out of a kernel's first launch."""
    from megatron_crnet.model import residual_kernels

    monkeypatch.setattr(residual_kernels, "add_previous", lambda *_: fail())
    working_kernels.cache_clear()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        working_kernels(torch.device("cpu"), torch.float32, 48)
    return caught.value


def thrown(error: Exception) -> Callable[[], object]:
    def throw() -> object:
        raise error

    return throw


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        # Triton's own way to say so when it loads a kernel
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_a_gpu_that_is_full_or_broken_is_no_fault_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    assert failing(monkeypatch, thrown(error)) is error


def test_a_failing_disk_under_the_cache_is_no_fault_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for fail in ((tmp_path / "gone").read_text, thrown(OSError(errno.ESTALE, "Stale file handle"))):
        found = failing(monkeypatch, fail)
        assert isinstance(found, CrnetError)
        assert found.exit_status == 1
        assert "TRITON_CACHE_DIR" in str(found)


def test_a_missing_compiler_is_a_fault_of_the_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from triton.runtime.build import compile_module_from_src

    for compiler in ("/nonexistent/cc", str(tmp_path), "false"):
        monkeypatch.setenv("CC", compiler)
        found = failing(monkeypatch, lambda: compile_module_from_src("", "nothing"))
        assert isinstance(found, ConfigError), compiler
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert isinstance(failing(monkeypatch, lambda: compile_module_from_src("", "nothing")), ConfigError)


def test_kernels_run_only_where_they_are_wanted_and_triton_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert runs_kernels(cuda, fusion=True)
    assert not runs_kernels(cuda, fusion=False)
    assert not runs_kernels(cpu, fusion=True)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not runs_kernels(cuda, fusion=True)


@pytest.mark.parametrize("wrong", [None, 0, 1, 2, 3])
def test_wrong_numbers_are_refused(monkeypatch: pytest.MonkeyPatch, wrong: int | None) -> None:
    from megatron_crnet.model import residual_kernels

    def off(index: int, x: torch.Tensor) -> torch.Tensor:
        return x * 1.001 if index == wrong else x

    def gradients(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grad, grad_beta = EAGER.gradients(*args)
        return off(1, grad), off(2, grad_beta)

    monkeypatch.setattr(residual_kernels, "add_previous", lambda *args: off(0, EAGER.add_previous(*args)))
    monkeypatch.setattr(residual_kernels, "gradients", gradients)
    monkeypatch.setattr(residual_kernels, "remove_update", lambda *args: off(3, EAGER.remove_update(*args)))
    working_kernels.cache_clear()
    try:
        if wrong is None:
            working_kernels(torch.device("cpu"), torch.float32, 48)
            return
        with pytest.raises(ConfigError, match="computes wrong numbers on cpu: set training"):
            working_kernels(torch.device("cpu"), torch.float32, 48)
    finally:
        working_kernels.cache_clear()
