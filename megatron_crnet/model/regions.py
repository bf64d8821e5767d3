"""The functions of `model/glue.py` in the autograd graph.

A region that makes a linear output Y_l usable also hands it on to the next layer, as an output of its own: the gradient
that comes back there is the next layer's own, unscaled, and is used and scaled together with the region's other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_crnet.model.glue import EAGER, Glue, each
from megatron_crnet.model.residual_product import ResidualProduct

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary embedding, [s, b or 1, 1, d / 2], fp32."""
Outputs = tuple[Tensor, ...]


class HeadNorms(NamedTuple):
    """Weights of the RMSNorms of each head of q and of k, [d], and their eps."""

    q: Tensor
    k: Tensor
    eps: float


def rotation_of(angles: Tensor) -> Rotation:
    """The rotation by Megatron-Core's angles, [s, b or 1, 1, d], whose halves are equal."""
    half = angles[..., : angles.shape[-1] // 2].float()
    return half.cos(), half.sin()


@dataclass(frozen=True)
class Regions:
    """The regions of a layer.

    Attributes:
        glue: what computes them.
        eps: `model.cross_layer_epsilon`.
        activates: silu(gate) up, else gate up.
        residual: what adds s(beta) Y_prev to a product with B as it is written; None: `scaled` is a pass of its own.
    """

    glue: Glue = EAGER
    eps: float = 1e-6
    activates: bool = True
    residual: ResidualProduct | None = None

    def rotary(
        self, rotation: Rotation, norms: HeadNorms | None, betas: Tensor | None, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Outputs, Outputs]:
        """Query and key after RoPE, [s, b, heads, d], and v; then q, k, v for the next layer, [s, b, w].

        Args:
            norms: of each head of q and of k, before RoPE.
            betas: the next layer's, of q, k, v, [3] in fp32; None where that layer multiplies what it sends back by
                s(beta) itself, or there is none.
        """
        if norms is None:
            out = _Rotary.apply(self, betas, *rotation, q, k, v)
        else:
            out = _NormedRotary.apply(self, norms.eps, betas, *rotation, norms.q, norms.k, q, k, v)
        return out[:3], out[3:]

    def swiglu(self, betas: Tensor | None, gate: Tensor, up: Tensor) -> tuple[Tensor, Outputs]:
        """silu(gate) up, or gate up; then gate and up for the next layer. Shapes [s, b, w]; betas: see `rotary`."""
        if not self.activates:
            assert betas is None, "only cola has a gate without silu, and no chain"
            return _Product.apply(self.glue, gate, up), (gate, up)
        activation, *outputs = _SwiGLU.apply(self, betas, gate, up)
        return activation, tuple(outputs)

    def gelu(self, betas: Tensor | None, bias: Tensor | None, up: Tensor) -> tuple[Outputs, Outputs]:
        """gelu(up + bias); then up for the next layer. Shapes [s, b, w], bias [w]; betas: see `rotary`."""
        activation, up = _GELU.apply(self, betas, bias, up)
        return (activation,), (up,)

    def carry(self, betas: Tensor | None, bias: Tensor | None, *outputs: Tensor) -> tuple[Outputs, Outputs]:
        """Outputs for their own layer, and for the next one.

        Args:
            betas: see `rotary`.
            bias: of all outputs, side by side; the layer's own have it, the next one's have not.
        """
        out = _Carry.apply(self, betas, bias, *outputs)
        return out[: len(outputs)], out[len(outputs) :]

    def receive(self, betas: Tensor, previous: Sequence[Tensor]) -> Outputs:
        """The previous layer's outputs, where that layer does not know this one's betas."""
        return _Receive.apply(self, betas, *previous)

    def scaled(self, betas: Tensor, previous: Sequence[Tensor]) -> Outputs:
        """s(beta) Y_prev, outside of the autograd graph."""
        return self.glue.scaled(previous, betas, self.eps)

    def unscaled(self, betas: Tensor, differences: Sequence[Tensor]) -> Outputs:
        """The inverse of `scaled`."""
        return self.glue.unscaled(differences, betas, self.eps)


PLAIN = Regions()
"""By the plain functions."""


class Norm(torch.autograd.Function):
    """RMSNorm of x [..., width], with a bias LayerNorm, and x itself, so that the sum of both gradients is part of
    backward."""

    @staticmethod
    def forward(ctx: Any, glue: Glue, x: Tensor, *weights_and_eps: Any) -> tuple[Tensor, Tensor]:
        """The norm by a weight, or a weight and a bias, and eps; and x."""
        *weights, eps = weights_and_eps
        norm = glue.layer_norm if len(weights) == 2 else glue.norm
        ctx.gradients = glue.layer_norm_backward if len(weights) == 2 else glue.norm_backward
        normed, *of_rows = norm(x, *weights, eps)
        ctx.save_for_backward(x, *weights, *of_rows)
        ctx.set_materialize_grads(False)
        return normed, x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x and the weights."""
        grad, grad_stream = grads
        if grad is None:
            return None, grad_stream, *(None for _ in ctx.needs_input_grad[2:])
        return None, *ctx.gradients(grad, grad_stream, *ctx.saved_tensors), None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, regions: Regions, betas: Tensor | None, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, ...]:
        query, key = (regions.glue.rotate(x.unflatten(-1, (-1, 2 * cos.shape[-1])), cos, sin) for x in (q, k))
        # of outputs, what attention keeps as well
        kept = (query, key, v) if betas is not None else (None, None, None)
        _save(ctx, regions, betas, cos, sin, *kept)
        return query, key, v.detach(), q.detach(), k.detach(), v.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        betas, cos, sin, query, key, v = ctx.saved_tensors
        glue, eps, (of_q, of_k, of_v) = ctx.regions.glue, ctx.regions.eps, each(betas, 3)
        d_query, d_key, d_value, next_q, next_k, next_v = grads
        d_q, d_of_q = glue.rotate_backward(d_query, cos, sin, next_q, query, of_q, eps)
        d_k, d_of_k = glue.rotate_backward(d_key, cos, sin, next_k, key, of_k, eps)
        d_v, d_of_v = (d_value, None) if next_v is None else glue.add_carried(d_value, next_v, v, of_v, eps)
        return None, _stacked(d_of_q, d_of_k, d_of_v), None, None, d_q.flatten(2), d_k.flatten(2), d_v


class _NormedRotary(torch.autograd.Function):
    """`_Rotary` after a norm of each head: of q and k the outputs are kept, not what attention gets."""

    @staticmethod
    def forward(
        ctx: Any, regions: Regions, eps: float, betas: Tensor | None, cos: Tensor, sin: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        of_q, of_k, q, k, v = inputs
        query, inverse_q = regions.glue.norm_rotate(q.unflatten(-1, (-1, len(of_q))), of_q, cos, sin, eps)
        key, inverse_k = regions.glue.norm_rotate(k.unflatten(-1, (-1, len(of_k))), of_k, cos, sin, eps)
        _save(ctx, regions, betas, cos, sin, of_q, of_k, q, k, v if betas is not None else None, inverse_q, inverse_k)
        return query, key, v.detach(), q.detach(), k.detach(), v.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        betas, cos, sin, *weights, q, k, v, inverse_q, inverse_k = ctx.saved_tensors
        glue, eps, (*of_heads, of_v) = ctx.regions.glue, ctx.regions.eps, each(betas, 3)
        *d_heads, d_value, next_q, next_k, next_v = grads
        parts = zip(d_heads, (q, k), weights, (inverse_q, inverse_k), (next_q, next_k), of_heads, strict=True)
        (d_q, d_of_norm_q, d_of_q), (d_k, d_of_norm_k, d_of_k) = (
            glue.norm_rotate_backward(grad, x.view_as(grad), weight, inverse, cos, sin, carried, beta, eps)
            for grad, x, weight, inverse, carried, beta in parts
        )
        d_v, d_of_v = (d_value, None) if next_v is None else glue.add_carried(d_value, next_v, v, of_v, eps)
        d_betas = _stacked(d_of_q, d_of_k, d_of_v)
        return None, None, d_betas, None, None, d_of_norm_q, d_of_norm_k, d_q.flatten(2), d_k.flatten(2), d_v


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, regions: Regions, betas: Tensor | None, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        _save(ctx, regions, betas, gate, up)
        return regions.glue.swiglu(gate, up), gate.detach(), up.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        betas, gate, up = ctx.saved_tensors
        grad, *carried = grads
        d_gate, d_up, d_betas = ctx.regions.glue.swiglu_backward(grad, gate, up, carried, betas, ctx.regions.eps)
        return None, d_betas, d_gate, d_up


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, glue: Glue, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.glue = glue
        return glue.product(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.glue.product_backward(*grads, *ctx.saved_tensors)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, regions: Regions, betas: Tensor | None, bias: Tensor | None, up: Tensor
    ) -> tuple[Tensor, Tensor]:
        _save(ctx, regions, betas, bias, up)
        return regions.glue.gelu(up, bias), up.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        betas, bias, up = ctx.saved_tensors
        (beta,) = each(betas, 1)
        grad, carried = grads
        d_up, d_bias, d_beta = ctx.regions.glue.gelu_backward(grad, up, bias, carried, beta, ctx.regions.eps)
        return None, _stacked(d_beta), d_bias, d_up


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, regions: Regions, betas: Tensor | None, bias: Tensor | None, *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        _save(ctx, regions, betas, *(y if betas is not None else None for y in outputs))
        ctx.is_biased = bias is not None
        if bias is None:
            return *(y.detach() for y in outputs), *(y.detach() for y in outputs)
        biases = bias.split([y.shape[-1] for y in outputs])
        used = (regions.glue.biased(y, part) for y, part in zip(outputs, biases, strict=True))
        return *used, *(y.detach() for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        betas, *outputs = ctx.saved_tensors
        count, glue, eps = len(outputs), ctx.regions.glue, ctx.regions.eps
        parts = list(zip(grads[:count], grads[count:], outputs, each(betas, count), strict=True))
        if not ctx.is_biased:
            found = [glue.add_carried(*part, eps) for part in parts]
            return None, _stacked(*(grad_beta for _, grad_beta in found)), None, *(grad for grad, _ in found)
        of_outputs, of_biases, of_betas = zip(*(glue.biased_backward(*part, eps) for part in parts), strict=True)
        return None, _stacked(*of_betas), torch.cat(of_biases), *of_outputs


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, regions: Regions, betas: Tensor, *previous: Tensor) -> tuple[Tensor, ...]:
        _save(ctx, regions, betas, *previous)
        return tuple(y.detach() for y in previous)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        betas, *previous = ctx.saved_tensors
        glue, eps = ctx.regions.glue, ctx.regions.eps
        found = [glue.carried_backward(*args, eps) for args in zip(grads, previous, betas, strict=True)]
        return None, _stacked(*(grad_beta for _, grad_beta in found)), *(grad for grad, _ in found)


def _save(ctx: Any, regions: Regions, *tensors: Tensor | None) -> None:
    ctx.regions = regions
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _stacked(*grads: Tensor | None) -> Tensor | None:
    """The gradient of the betas; None where the next layer is elsewhere, or there is none."""
    found = [grad for grad in grads if grad is not None]
    return torch.stack(found) if found else None
