from __future__ import annotations

import torch
from torch._subclasses import FakeTensorMode

from megatron_crnet.planning.counters import LiveMemory


def work(memory: LiveMemory) -> list[int]:
    x = torch.ones(256)  # 1 KiB
    seen = [memory.current]
    y = x * 2
    seen.append(memory.current)
    z = y.view(16, 16)  # a view is no memory
    del y
    seen.append(memory.current)
    del z
    seen.append(memory.current)
    memory.reset_peak()
    _ = x.exp().sum()
    seen += [memory.current, memory.peak]
    return seen


def test_storages_count_from_their_creation_to_their_end_real_and_fake_alike() -> None:
    with LiveMemory() as memory:
        real = work(memory)
    assert real == [1024, 2048, 2048, 1024, 1028, 2052]
    with FakeTensorMode(), LiveMemory() as memory:
        assert work(memory) == real


def test_a_tensor_that_is_only_a_shape_is_no_memory() -> None:
    with LiveMemory() as memory:
        x = torch.zeros_like(torch.ones(256), device="meta")
        assert memory.current == 0
    with FakeTensorMode(), LiveMemory() as memory:
        y = torch.zeros_like(torch.ones(256), device="meta")
        assert memory.current == 0
    assert x.shape == y.shape


def test_what_backward_needs_is_counted() -> None:
    x = torch.ones(256, requires_grad=True)
    with LiveMemory() as memory:
        y = x.exp().sin().sum()
        assert memory.current == 1024 + 4  # exp keeps its output and sin its input, which is the same; and y
        y.backward()
        del y
        assert memory.current == 1024  # the gradient
