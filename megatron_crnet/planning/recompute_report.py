"""What each recomputation strategy keeps, holds and computes: counted in a pass of the real layers, beside formulas.

One pipeline stage's layers run forward and backward on one micro-batch, on real tensors or on fake ones, which have
shapes and no memory, so that a 7B model can be counted on a laptop. Embedding, output layer and optimizer are left
out: recomputation does not touch them.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from megatron_crnet.config.megatron import CRNetTransformerConfig, build_transformer_config
from megatron_crnet.config.positions import POSITIONS
from megatron_crnet.config.schema import Config, RecomputeConfig
from megatron_crnet.distributed.process_groups import initialize_parallel
from megatron_crnet.model.block import CRNetTransformerBlock
from megatron_crnet.planning.live_memory import LiveMemory
from megatron_crnet.recompute.planner import kept_widths

aten = torch.ops.aten


@dataclass(frozen=True)
class Measurement:
    """One strategy on one micro-batch of one rank.

    Attributes:
        name: the strategy and its options.
        kept: bytes that the forward pass leaves for backward.
        peak: largest number of bytes alive during backward, gradients of activations included, weights and their
            gradients not.
        flops: floating-point operations of the forward and backward pass.
        formula: `kept` by the formulas of docs/recomputation.md.
        segments: layers in each segment, from the first on.
    """

    name: str
    kept: int
    peak: int
    flops: int
    formula: float
    segments: list[int]

    @property
    def transient(self) -> int:
        """Bytes at the peak beyond those kept."""
        return self.peak - self.kept


STRATEGIES = {
    "none": RecomputeConfig(),
    "replay": RecomputeConfig(strategy="replay"),
    "replay, attention kept": RecomputeConfig(strategy="replay", keep_attention_output=True),
    "inverse": RecomputeConfig(strategy="inverse"),
    "inverse, attention kept": RecomputeConfig(strategy="inverse", keep_attention_output=True),
    "full": RecomputeConfig(strategy="full"),
}


EQUAL = ("replay", "full")
"""Strategies that are also measured with segments of one length."""


def measure_strategies(config: Config, *, fake: bool, segment_length: int | None = None) -> list[Measurement]:
    """Every strategy on the layers of `config`, in one process without parallelism.

    Args:
        fake: count on fake tensors; otherwise the pass really runs.
        segment_length: also measure EQUAL with segments of this length.
    """
    single = dataclasses.replace(config, parallel=type(config.parallel)(), deepspeed={})
    context = initialize_parallel(single)
    strategies = dict(STRATEGIES)
    if segment_length:
        of_length = {name: dataclasses.replace(strategies[name], segment_length=segment_length) for name in EQUAL}
        strategies |= {f"{name}, segments of {segment_length}": recompute for name, recompute in of_length.items()}
    try:
        return [_measure(name, dataclasses.replace(single, recompute=r), fake) for name, r in strategies.items()]
    finally:
        context.heartbeat.close()
        parallel_state.destroy_model_parallel()


def _measure(name: str, config: Config, fake: bool) -> Measurement:
    transformer = build_transformer_config(config)
    tensors = FakeTensorMode() if fake else nullcontext()
    with tensors:
        block = _block(transformer)
    _plan_inverse(block)
    with tensors:
        batch = (config.training.seq_length, config.training.micro_batch_size)
        device = next(block.parameters()).device
        hidden = torch.randn(
            *batch, config.model.hidden_size, dtype=transformer.params_dtype, device=device
        ).requires_grad_()
        rotary = torch.randn(batch[0], 1, 1, transformer.kv_channels, device=device)
        # a pass of its own, because PyTorch's counter holds on to what passes through modules
        with flop_counter() as flops:
            block(hidden, rotary_pos_emb=rotary).sum().backward()
        kept, peak = _count(block, hidden, rotary)
    lengths = [len(segment) for segment in block.segments]
    elements = kept_widths(transformer, block.layer_range, block.segments) * batch[0] * batch[1]
    return Measurement(name, kept, peak, flops.get_total_flops(), elements * hidden.element_size(), lengths)


def _block(config: CRNetTransformerConfig) -> CRNetTransformerBlock:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    block = CRNetTransformerBlock(config, None, groups, pre_process=True, post_process=False)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.zeros_like(parameter)
    return block.train()


def _plan_inverse(block: CRNetTransformerBlock) -> None:
    """Segments under `inverse` for the first betas and outputs of equal norm."""
    if block.config.recompute_strategy == "inverse":
        even = {layer: torch.ones(len(POSITIONS)) for layer in block.layer_range}
        block.plan_inverse_segments({layer: block.config.beta_init * ones for layer, ones in even.items()}, even)


def _count(block: CRNetTransformerBlock, hidden: torch.Tensor, rotary: torch.Tensor) -> tuple[int, int]:
    """Kept bytes and peak bytes. What enters, what leaves and the gradient of what leaves do not count."""
    hidden.grad = torch.zeros_like(hidden)
    with LiveMemory() as memory:
        out = block(hidden, rotary_pos_emb=rotary)
        kept = memory.current - out.untyped_storage().nbytes()
        grad = torch.ones_like(out)
        around = out.untyped_storage().nbytes() + grad.untyped_storage().nbytes()
        memory.reset_peak()
        out.backward(grad)
        peak = memory.peak - around
    return kept, max(peak, kept)


def _forward_count(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _backward_count(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


_CPU_ATTENTION: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _forward_count,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_count,
}
"""Operations of the CPU's attention kernels: PyTorch counts those of CUDA only; the CPU's have the same shapes."""


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, with the CPU's attention."""
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
