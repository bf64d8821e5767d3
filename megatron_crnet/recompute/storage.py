"""Where the tensors kept for backward live: DeepSpeed's `activation_checkpointing` section, key by key.

The section is read by `deepspeed.checkpointing.configure` (the engine calls it) and its flags are read there, live.
DeepSpeed's own `CheckpointFunction` keeps only the inputs of a checkpointed call and empties its caller's tensors;
here a segment hands over whatever it keeps, and gets it back once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.utils.timer import BACKWARD_GLOBAL_TIMER, FORWARD_GLOBAL_TIMER, SynchronizedWallClockTimer
from torch import Tensor

from megatron_crnet.config.megatron import CRNetTransformerConfig


@dataclass(frozen=True)
class StoredTensors:
    """Tensors that were put away; dropping this object drops them.

    What DeepSpeed's asynchronous engine holds (CUDA, `cpu_checkpointing`) it lets go at the next step's start.
    """

    _restorers: dict[str, Callable[[], Tensor]]

    def restore(self) -> dict[str, Tensor]:
        """The tensors by name, on their device; to be called once."""
        return {name: restorer() for name, restorer in self._restorers.items()}


class ActivationStore:
    """Keeps tensors as the `activation_checkpointing` section says."""

    def __init__(self, config: CRNetTransformerConfig) -> None:
        self._has_copies = config.tensor_model_parallel_size > 1 and not config.sequence_parallel
        self._buffers: dict[_Layout, _Slots] = {}
        self._timers: SynchronizedWallClockTimer | None = None

    def keep(self, tensors: Mapping[str, Tensor], replicated: Collection[str] = ()) -> StoredTensors:
        """Put tensors away. They are not changed, and nothing but the stored form refers to them afterwards.

        Args:
            replicated: names of those that every tensor-parallel rank holds whole, without sequence parallelism.
        """
        partitions = checkpointing.PARTITION_ACTIVATIONS and self._has_copies
        return StoredTensors(
            {name: self._keep(x.detach(), partitions and name in replicated) for name, x in tensors.items()}
        )

    def _keep(self, tensor: Tensor, partition: bool) -> Callable[[], Tensor]:
        if partition and tensor.numel() % checkpointing.mp_size == 0:
            return self._keep_partition(tensor)
        if checkpointing.CONTIGUOUS_CHECKPOINTING:
            return self._keep_in_buffer(tensor, tensor.device)
        # DeepSpeed's asynchronous copies; there are none where the device is the host
        engine = checkpointing._get_cpu_offload_engine()
        token = engine.offload_input(tensor) if engine is not None else None
        if token is not None:
            return lambda: engine.restore_input(token)
        if checkpointing.CPU_CHECKPOINT and tensor.device.type != "cpu":
            return self._keep_on_host(tensor)
        return lambda: tensor

    def _keep_partition(self, tensor: Tensor) -> Callable[[], Tensor]:
        size, device = torch.tensor(tensor.shape), tensor.device
        (part,) = checkpointing.partition_activations([tensor], checkpointing.CPU_CHECKPOINT, False)
        held = self._keep_in_buffer(part, device) if checkpointing.CONTIGUOUS_CHECKPOINTING else lambda: part
        # gathered into a tensor of its own: DeepSpeed points the one that it is given at the whole
        return lambda: checkpointing.gather_partitioned_activations([held().detach(), size], device)[0]

    def _keep_on_host(self, tensor: Tensor) -> Callable[[], Tensor]:
        # with its strides, as `_Layout` says; `.to` would close gaps
        shape, stride, dtype, device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        held = torch.empty_strided(shape, stride, dtype=dtype, device="cpu").copy_(tensor)
        return lambda: torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(held)

    def _keep_in_buffer(self, tensor: Tensor, device: torch.device) -> Callable[[], Tensor]:
        where = torch.device("cpu") if checkpointing.CPU_CHECKPOINT else tensor.device
        layout = _Layout(tensor.shape, tensor.stride(), tensor.dtype, where)
        held = self._buffers.setdefault(layout, _Slots(layout)).take()
        held.copy_(tensor)
        return lambda: held.to(device)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Around a segment's forward pass: `synchronize_checkpoint_boundary` and `profile`."""
        with self._observed(FORWARD_GLOBAL_TIMER):
            yield

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Around a segment's backward pass, recomputation included."""
        with self._observed(BACKWARD_GLOBAL_TIMER):
            yield

    @contextmanager
    def _observed(self, name: str) -> Iterator[None]:
        if checkpointing.SYNCHRONIZE:
            get_accelerator().synchronize()
        if checkpointing.PROFILE_TIME:
            self._timers = self._timers or SynchronizedWallClockTimer()
            self._timers(name).start()
        try:
            yield
        finally:
            if checkpointing.PROFILE_TIME and self._timers is not None:
                self._timers(name).stop()
                self._timers.log([name])
            if checkpointing.SYNCHRONIZE:
                get_accelerator().synchronize()


@dataclass(frozen=True)
class _Layout:
    shape: torch.Size
    stride: tuple[int, ...]
    """As it was, gaps included: kernels may add in another order when it changes, and bits would differ."""
    dtype: torch.dtype
    device: torch.device


class _Slots:
    """`contiguous_memory_optimization`: room for tensors of one layout, `number_checkpoints` of them at a time."""

    def __init__(self, layout: _Layout) -> None:
        self._layout = layout
        self._free: list[Tensor] = []

    def take(self) -> Tensor:
        """A slot; it is free again when the returned tensor object is gone."""
        if not self._free:
            self._free.extend(self._allocate())
        slot = self._free.pop()
        handed_out = slot.detach()
        weakref.finalize(handed_out, self._free.append, slot)
        return handed_out

    def _allocate(self) -> tuple[Tensor, ...]:
        layout = self._layout
        extent = 1 + sum((size - 1) * stride for size, stride in zip(layout.shape, layout.stride, strict=True))
        # kernels may add in another order where a tensor is aligned otherwise than the one that was saved
        extent += -extent % 64
        return torch.empty_strided(
            (checkpointing.num_layers, *layout.shape),
            (extent, *layout.stride),
            dtype=layout.dtype,
            device=layout.device,
            pin_memory=layout.device.type == "cpu" and torch.cuda.is_available(),
        ).unbind()
