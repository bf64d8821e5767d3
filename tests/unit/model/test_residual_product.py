from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from megatron_crnet.model import residual_product as module
from megatron_crnet.model.lowrank import ProductOptions, low_rank_outputs
from megatron_crnet.model.regions import Regions
from megatron_crnet.model.residual_product import (
    choose_residual,
    is_right,
    readable,
    suits,
    two_passes,
    working_residual,
)
from megatron_crnet.planning.counters import OperationCounter
from megatron_crnet.utils.errors import ConfigError

CPU, EPS = torch.device("cpu"), 1e-6

INTERPRETED = """
import json
import torch
from megatron_crnet.model.residual_product import by_kernel, is_right, two_passes

def errors(rows, width, rank, beta, dtype):
    torch.manual_seed(0)
    z = torch.randn(rows, 3 * rank, dtype=dtype)[:, rank : 2 * rank]
    b, wide = torch.randn(width, rank, dtype=dtype), torch.randn(rows, 1, 2 * width, dtype=dtype)
    arguments = z, b, wide[..., width:], torch.tensor(beta), 1e-6
    found = by_kernel(*arguments, programs=2)
    assert found.is_contiguous() and found.shape == (rows, 1, width)
    wanted = two_passes(*(x.double() for x in arguments[:3]), torch.tensor(beta), 1e-6)
    return [((found - wanted).norm() / wanted.norm()).item(), dtype.itemsize]

sizes = (1, 8, 8, 0.5), (300, 520, 72, -1.5), (257, 128, 200, 0.0), (128, 256, 64, -0.0)
found = [errors(*size, dtype) for size in sizes for dtype in (torch.float32, torch.float16)]
trial = is_right(lambda *x: by_kernel(*x, programs=2), torch.device("cpu"), rows=300, dtype=torch.float16)
print(json.dumps([trial, found]))
"""


def test_the_kernel_is_right_with_edges_slices_and_every_sign_of_beta() -> None:
    """By Triton's interpreter, which knows no products in bf16, and is chosen before Triton is imported."""
    pytest.importorskip("triton")
    command, environment = [sys.executable, "-c", INTERPRETED], {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    trial, errors = json.loads(done.stdout)
    assert trial
    assert all(error < (1e-6 if size == 4 else 5e-4) for error, size in errors), errors


def arguments(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(0)
    z, b, previous = (torch.randn(shape, generator=generator).to(dtype) for shape in ((6, 8), (16, 8), (3, 2, 16)))
    return z, b, previous, torch.tensor(-0.5), EPS


def test_two_passes_are_the_sum_and_leave_their_inputs() -> None:
    z, b, previous, beta, eps = arguments(torch.float64)
    before = previous.clone()
    wanted = (-0.5 - EPS) * previous + (z @ b.t()).view(previous.shape)
    torch.testing.assert_close(two_passes(z, b, previous, beta, eps), wanted, rtol=1e-6, atol=1e-6)
    sliced = torch.cat((previous, previous), dim=-1)[..., 16:]
    assert torch.equal(two_passes(z, b, sliced, beta, eps), two_passes(z, b, previous, beta, eps))
    assert torch.equal(previous, before)


def test_a_group_of_positions_is_the_same_in_one_pass_and_in_two() -> None:
    torch.manual_seed(0)
    z, stacks = torch.randn(5, 2, 3 * 4 + 6), [torch.randn(3, 7, 4), torch.randn(1, 9, 6)]
    previous, betas = [torch.randn(5, 2, w) for w in (7, 7, 7, 9)], torch.tensor([0.9, -0.4, 0.0, 2.0])
    one, two = (
        low_rank_outputs(z, stacks, betas, previous, ProductOptions(regions=Regions(residual=residual)))
        for residual in (two_passes, None)
    )
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_only_matrices_in_bf16_whose_rows_are_aligned_have_the_kernel() -> None:
    assert suits(torch.bfloat16, [(2, 5504, 64), (8, 8)])
    assert not suits(torch.float32, [(8, 8)])
    assert not suits(torch.bfloat16, [(8, 8), (5461, 64)])
    assert not suits(torch.bfloat16, [(64, 12)])


@pytest.mark.parametrize(
    ("capability", "chosen"), [((8, 0), False), ((9, 0), True), ((10, 3), False), ((12, 0), False)]
)
def test_the_device_decides_once(capability: tuple[int, int], chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compiles", lambda device, fusion: fusion)
    monkeypatch.setattr(module, "working_residual", lambda device: two_passes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    weight = torch.empty(1, dtype=torch.bfloat16)
    assert choose_residual(weight, [(8, 8)], fusion=True) is (two_passes if chosen else None)
    assert choose_residual(weight, [(8, 8)], fusion=False) is None
    assert choose_residual(weight, [(8, 9)], fusion=True) is None
    with FakeTensorMode():
        assert choose_residual(torch.empty(1, dtype=torch.bfloat16), [(8, 8)], fusion=True) is None


def test_cpus_add_in_two_passes() -> None:
    assert choose_residual(torch.empty(1, dtype=torch.bfloat16), [(8, 8)], fusion=True) is None


def test_only_what_the_kernel_cannot_read_is_copied() -> None:
    flat = torch.arange(8 * 32, dtype=torch.bfloat16)
    whole = flat.view(8, 32)
    for x in (whole, whole[:, 8:16], whole[:1, :8]):
        assert readable(x) is x
    for x in (flat[1:241].view(10, 24), whole[:, 4:12], whole[:, ::2], flat[:252].view(9, 28)[:, :8]):
        assert readable(x).data_ptr() != x.data_ptr()
        assert torch.equal(readable(x), x)


def tried(monkeypatch: pytest.MonkeyPatch, trial: Callable[..., bool]) -> Callable[..., Tensor]:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2))
    monkeypatch.setattr(module, "is_right", trial)
    return working_residual.__wrapped__(CPU)


def test_operations_are_counted_as_those_of_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    product = tried(monkeypatch, lambda *args, **keywords: True)
    with OperationCounter() as counter:
        found = product(*arguments())
    assert torch.equal(found, two_passes(*arguments()))
    assert counter.total == 2 * 6 * 8 * 16


def fails(*args: object, **keywords: object) -> bool:
    raise RuntimeError("no room\nfor tiles")


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        (fails, "does not run on cpu (RuntimeError: no room for tiles): set"),
        (lambda *args, **keywords: False, "gives other numbers on cpu: set"),
    ],
    ids=["does not run", "is wrong"],
)
def test_a_kernel_that_fails_ends_the_run_with_one_line(
    trial: Callable[..., bool], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as raised:
        tried(monkeypatch, trial)
    assert f"{words} training.cross_layer_fusion false" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_wrong_product_is_noticed() -> None:
    assert is_right(two_passes, CPU, rows=300)
    assert not is_right(lambda z, b, y, beta, eps: two_passes(z, b, y, -beta, eps), CPU, rows=300)
    assert not is_right(lambda z, b, y, beta, eps: two_passes(z.flip(1), b, y, beta, eps), CPU, rows=300)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width", "rank"), [(1, 8, 8), (300, 328, 72), (8192, 2048, 512), (1000, 5504, 512)])
def test_on_a_gpu_it_is_right_and_the_same_bits_wherever_tensors_lie(rows: int, width: int, rank: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    make = {"device": device, "dtype": torch.bfloat16}
    b = torch.randn(width, rank, **make) * rank**-0.5
    product = choose_residual(b, [tuple(b.shape)], fusion=True)
    if product is None:
        pytest.skip("the kernel is for Hopper GPUs")
    z, previous = torch.randn(rows, 3 * rank, **make)[:, rank : 2 * rank], torch.randn(rows, width, **make)
    beta = torch.tensor(-0.7, device=device)
    found = product(z, b, previous, beta, EPS)
    wanted = (-0.7 - EPS) * previous.double() + z.double() @ b.double().t()
    assert (found - wanted).norm() / wanted.norm() < 2.5e-3
    moved = torch.empty(width * rank + 1, **make)[1:].view(width, rank).copy_(b)
    wide = torch.cat((previous, previous), dim=1)
    with ThreadPoolExecutor(1) as pool:  # as outputs are rebuilt in autograd's thread
        rebuilt = pool.submit(product, z.contiguous(), b, wide[:, width:], beta, EPS).result()
    assert torch.equal(rebuilt, found)
    assert torch.equal(product(z, moved, previous, beta, EPS), found)


@pytest.mark.gpu
def test_on_a_gpu_it_is_recorded_in_a_graph() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    z, b, previous, beta, eps = (x.to(device) if isinstance(x, Tensor) else x for x in arguments())
    product = choose_residual(b, [tuple(b.shape)], fusion=True)
    if product is None:
        pytest.skip("the kernel is for Hopper GPUs")
    wanted = product(z, b, previous, beta, eps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chained = product(z, b, product(z, b, previous, beta, eps), beta, eps)
    graph.replay()
    assert torch.equal(chained, product(z, b, wanted, beta, eps))
    previous.add_(1)
    graph.replay()
    assert torch.equal(chained, product(z, b, product(z, b, previous, beta, eps), beta, eps))
