"""AdamW with 8-bit moments in blocks (Dettmers et al., 2022, arXiv:2110.02861).

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g²
    w <- (1 - lr decay) w - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

Between steps a matrix keeps m and sqrt(v) as 8-bit codes of a dynamic data type, with one fp32 scale per block of 256
elements of a parameter: the block's largest magnitude. Vectors (norms, beta) keep both in fp32.

Quantizing what was dequantized gives the same values to the bit, so checkpoints hold fp32 moments, as AdamW's do. Why
neither torchao's nor bitsandbytes' optimizer is used: docs/decisions/adamw8bit.md.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from megatron_crnet.engine.adam import ParamGroup, PerParameterOptimizer
from megatron_crnet.engine.state_kinds import MOMENTS
from megatron_crnet.model.compiled import cannot_compile

Segments = list[tuple[int, int]]
Blocks = tuple[Tensor, Tensor, Tensor]

BLOCK = 256
"""Elements per scale."""
CHUNK, COMPILED_CHUNK = 2**20, 2**24
"""Elements that are updated at once: without torch.compile, which has temporary tensors for them, and with it."""
SMALLEST_SCALE = 2.0**-40
"""Blocks of smaller magnitudes become 0. The square of the smallest code times this is still a normal fp32 number."""


def code_values(signed: bool) -> Tensor:
    """The value of each code, ascending: dynamic 8-bit numbers with -1 (if signed), 0 and 1.

    In every decade from 1e-7 to 1 the values are evenly spaced, and twice as many as in the decade below.
    """
    decades = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        decades.append(10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = torch.cat(decades)
    # bitsandbytes and torchao have no -1, so a block whose largest magnitude is negative shrinks with each rounding
    negative = torch.cat([-positive[:-1], torch.tensor([-1.0])]) if signed else positive[:0]
    return torch.cat([negative, torch.tensor([0.0, 1.0]), positive]).sort().values


def quantize(values: Tensor, code_map: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of blocks, the rows of `values`."""
    scales = torch.threshold(values.abs().amax(1), SMALLEST_SCALE, 0.0)
    shares = values / scales.clamp_min(SMALLEST_SCALE)[:, None]
    return torch.bucketize(shares, (code_map[1:] + code_map[:-1]) / 2, out_int32=True).to(torch.uint8), scales


def store(values: Tensor, codes: Tensor, scales: Tensor, code_map: Tensor) -> None:
    """Quantize into `codes` and `scales`."""
    new_codes, new_scales = quantize(values, code_map)
    codes.copy_(new_codes)
    scales.copy_(new_scales)


def dequantize(codes: Tensor, scales: Tensor, code_map: Tensor) -> Tensor:
    """The values of blocks."""
    return code_map[codes.int()].mul_(scales[:, None])


class BlockwiseMoment:
    """A moment of a tensor in 8-bit codes.

    Args:
        like: the tensor.
        segments: start and number of elements of each part of it that has blocks of its own. What no segment holds is
            padding, which stays 0.
        code_map: the value of each code.
        is_root: the codes are those of the moment's square root.
    """

    def __init__(self, like: Tensor, segments: Segments, code_map: Tensor, is_root: bool) -> None:
        self.segments, self.code_map, self.is_root = dict(segments), code_map, is_root
        blocks = itertools.accumulate((-(-numel // BLOCK) for _, numel in segments), initial=0)
        self._first_block = dict(zip(self.segments, blocks, strict=False))
        self.codes = torch.zeros_like(like, dtype=torch.uint8, requires_grad=False)
        self.scales = torch.zeros(sum(-(-numel // BLOCK) for _, numel in segments), device=like.device)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that it holds."""
        return [self.codes, self.scales, self.code_map]

    def blocks(self, start: int, chunk: int = CHUNK) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Elements, codes [blocks, elements] and scales [blocks] of a segment, in chunks; an incomplete block last."""
        numel = self.segments[start]
        whole = numel // BLOCK * BLOCK
        for low, high in itertools.pairwise([*range(0, whole, chunk), whole, numel]):
            if low < high:
                elements = slice(start + low, start + high)
                codes = self.codes.view(-1)[elements].view(-1, min(BLOCK, high - low))
                yield elements, codes, self.scales[self._first_block[start] + low // BLOCK :][: len(codes)]

    def read(self, start: int) -> Tensor:
        """The values of the segment at `start`, flat and in fp32."""
        parts = [dequantize(codes, scales, self.code_map).view(-1) for _, codes, scales in self.blocks(start)]
        return torch.cat([part.square() if self.is_root else part for part in parts])

    def write(self, start: int, values: Tensor) -> None:
        """Set the segment at `start`."""
        for elements, codes, scales in self.blocks(start):
            part = values[elements.start - start : elements.stop - start].view(codes.shape)
            # rounded once: what MKL gives in fp32 may be its neighbour, and then another scale than was read
            store(part.double().sqrt().float() if self.is_root else part, codes, scales, self.code_map)


class AdamW8bit(PerParameterOptimizer):
    """AdamW with 8-bit moments in groups with `is_matrix`, and fp32 moments in the others.

    Args:
        groups: as `optimizer.parameter_groups` builds them.
        options: lr, betas, eps and weight_decay.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, options)
        self._code_maps: dict[str, Tensor] = {}
        self.segments: dict[Tensor, Segments] = {}
        """By tensor that is updated: its parameters. Ranks that hold copies of one of them must round it alike, so no
        block may reach into what lies beside it."""

    def new_moment(self, like: Tensor, kind: str, is_matrix: bool) -> Tensor | BlockwiseMoment:
        """A moment of a tensor at its start."""
        if not is_matrix:
            return torch.zeros_like(like, requires_grad=False)
        if kind not in self._code_maps:
            self._code_maps[kind] = code_values(signed=kind == MOMENTS[0]).to(like.device)
        segments = self.segments.get(like, [(0, like.numel())])
        return BlockwiseMoment(like, segments, self._code_maps[kind], is_root=kind == MOMENTS[1])

    def update(self, parameter: Tensor, gradient: Tensor, group: ParamGroup) -> None:
        """See the base."""
        if not group["is_matrix"]:
            self.update_by_adamw(parameter, gradient, group)
            return
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            state |= {kind: self.new_moment(parameter, kind, is_matrix=True) for kind in MOMENTS}
        first, second = (state[kind] for kind in MOMENTS)
        (beta1, beta2), eps, lr, decay = group["betas"], group["eps"], group["lr"], group["weight_decay"]
        state["step"] += 1
        step = int(state["step"])
        # tensors, because numbers that change would be compiled anew
        factors = [torch.tensor(x) for x in (1 - lr * decay, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step))]
        compiles = parameter.is_cuda and not is_in_torch_dispatch_mode()
        update, chunk = (compiled_update(parameter.device), COMPILED_CHUNK) if compiles else (update_blocks, CHUNK)
        flat, flat_gradient = parameter.detach().view(-1), gradient.reshape(-1)
        for start in first.segments:
            both = zip(first.blocks(start, chunk), second.blocks(start, chunk), strict=True)
            for (elements, codes, scales), (_, root_codes, root_scales) in both:
                (update if codes.shape[1] == BLOCK else update_blocks)(
                    flat[elements].view(codes.shape),
                    flat_gradient[elements].view(codes.shape),
                    (codes, scales, first.code_map),
                    (root_codes, root_scales, second.code_map),
                    factors,
                    (beta1, beta2),
                    eps,
                )


def update_blocks(
    weights: Tensor,
    gradients: Tensor,
    first: Blocks,
    root: Blocks,
    factors: list[Tensor],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of blocks, the rows of every tensor, in place.

    Args:
        first, root: codes, scales and code map of the first moment and of the root of the second.
        factors: 1 - lr * decay, lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t).
    """
    shrinking, step_size, correction = factors
    m = dequantize(*first).lerp_(gradients, 1 - betas[0])
    r = dequantize(*root).square_().lerp_(gradients.square(), 1 - betas[1]).sqrt_()
    weights.mul_(shrinking).sub_((step_size * m).div_((r * correction).add_(eps)))
    store(m, *first)
    store(r, *root)


@functools.cache
def compiled_update(device: torch.device) -> Callable[..., None]:
    """`update_blocks` in fused kernels.

    Raises:
        ConfigError: PyTorch cannot compile here.
    """
    # in this process: else each rank would start a process per core
    compiled = torch.compile(update_blocks, fullgraph=True, options={"compile_threads": 1})
    values = torch.zeros(2, BLOCK, device=device)
    first, root = (
        (torch.zeros_like(values, dtype=torch.uint8), values[:, 0].clone(), code_values(signed).to(device))
        for signed in (True, False)
    )
    factors = [torch.tensor(1.0) for _ in range(3)]
    try:
        compiled(values, values.clone(), first, root, factors, (0.9, 0.95), 1e-8)
    except Exception as error:  # compilers and their libraries may fail in any way
        raise cannot_compile("optimizer.name is adamw8bit", error, "use adamw") from error
    return compiled
