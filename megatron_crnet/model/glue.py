"""What a layer does between its matrix products and attention: pure functions, forward and backward, on one page.

    norm        n = x / rms(x) * w, and the residual stream x goes on
    layer_norm  n = (x - mean(x)) / std(x) * w + bias, as well
    rotate      RoPE of q and k: (a, b) -> (a cos - b sin, b cos + a sin) of the halves a, b of a head
    norm_rotate both, norm and rotate, of each head
    swiglu      act = silu(gate) up
    gelu        act = gelu(up + bias), in its tanh form
    biased      Y_l + bias, for the layer itself; the chain takes Y_l
    product     act = gate up, where silu stands between factors alone (CoLA)
    scaled      s(beta_l) Y_{l-1}, to which the products with B are added in place: Y_l = s(beta_l) Y_{l-1} + Z_l B_l
    unscaled    Y_{l-1} = (Y_l - Z_l B_l) / s(beta_l), from the difference

In backward every output Y_l has two gradients: of its use in layer l, and of the next layer's residual. The second
arrives as G_{l+1}, the gradient of Y_{l+1}, not yet multiplied by s(beta_{l+1}): the functions that read it anyway do
that, and give the gradient of beta_{l+1}, which is <G_{l+1}, Y_l> as ds/db = 1. So the residual costs no pass of its
own in backward (`carried`, below).

All arithmetic is fp32 whatever the storage is. On CUDA each function is compiled as one region
(`model/compiled.py`); these are its meaning, its fallback and its test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, dot, float32

FEW = 2**22
"""Elements that plain functions of wide tensors take at once: 16 MiB in fp32."""


Gradients = tuple[Sequence[Tensor], Sequence[Tensor | None]]
"""Gradients of wide tensors, and those that are sums over rows: of biases and betas."""


def signed_scale(beta: Tensor, eps: float) -> Tensor:
    """s(b) = sign(b)(|b| + eps) with sign(0) = +1, so that it can always be inverted; ds/db = 1."""
    return torch.where(beta < 0, beta - eps, beta + eps)


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * weight, and 1 / rms(x) in fp32, [..., 1]; x: [..., width]."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse).mul_(weight.float()).to(x.dtype), inverse


def norm_backward(
    grad: Tensor, grad_stream: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, which `grad_stream` is part of, and of the weight."""
    normed, wide = x.float() * inverse, grad.float()
    grad_weight = (wide * normed).sum(tuple(range(x.dim() - 1)))
    wide = wide * weight.float()
    grad_x = (wide - normed * (wide * normed).mean(-1, keepdim=True)).mul_(inverse)
    if grad_stream is not None:
        grad_x = grad_x.add_(grad_stream)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / std * weight + bias, and the mean and 1 / std in fp32, [..., 1]; x: [..., width]."""
    normed, mean, inverse = torch.native_layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps)
    return normed.to(x.dtype), mean, inverse


def layer_norm_backward(
    grad: Tensor, grad_stream: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, which `grad_stream` is part of, of the weight and of the bias."""
    wide = grad.float(), x.float(), weight.shape, mean, inverse, weight.float(), bias.float(), [True, True, True]
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(*wide)
    if grad_stream is not None:
        grad_x = grad_x.add_(grad_stream)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x, [s, b, heads, d]; cos and sin: [s, b or 1, 1, d / 2], fp32."""
    half, twice = x.shape[-1] // 2, [1] * (x.dim() - 1) + [2]
    sin = sin.repeat(twice)
    signed = torch.where(torch.arange(x.shape[-1], device=x.device) < half, -sin, sin)
    # of whole heads: halves that are joined would be one more pass where other sums need them
    wide = x.float()
    return (wide * cos.repeat(twice)).addcmul_(wide.roll(half, -1), signed).to(x.dtype)


def rotate_backward(
    grad: Tensor,
    cos: Tensor,
    sin: Tensor,
    carried: Tensor | None,
    rotated: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of x, and of beta: a rotation keeps inner products, so <G, x> is that of both rotated.

    Args:
        grad: of the result, [s, b, heads, d].
        carried, beta: see `add_carried`; of x, [s, b, heads d].
        rotated: the result; None without `beta`.
    """
    back = rotate(grad.float(), cos, -sin)
    if carried is None:
        return back.to(grad.dtype), None
    wide = carried.view(grad.shape).float()
    grad_beta = None
    if beta is not None and rotated is not None:
        grad_beta = _inner(rotate(wide, cos, sin), rotated, first=(-2, -1))
    return _add_scaled_(back, wide, beta, eps).to(grad.dtype), grad_beta


def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rotate` of `norm`, rounded once, and 1 / rms(x), [s, b, heads, 1]; x: [s, b, heads, d]."""
    normed, inverse = norm(x.float(), weight, eps)
    return rotate(normed, cos, sin).to(x.dtype), inverse


def norm_rotate_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    cos: Tensor,
    sin: Tensor,
    carried: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, of the weight, and of beta; see `rotate_backward`."""
    own, grad_weight = norm_backward(rotate(grad.float(), cos, -sin), None, x.float(), weight, inverse)
    carried = None if carried is None else carried.view(x.shape)
    grad_x, grad_beta = add_carried(own, carried, x, beta, eps)
    return grad_x.to(x.dtype), grad_weight, grad_beta


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up."""
    return F.silu(gate.float()).mul_(up.float()).to(gate.dtype)


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, carried: Sequence[Tensor | None], betas: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gate and up, and of their betas, [2]; `carried` and `betas`: see `add_carried`, of both."""

    def of(rows: slice) -> Gradients:
        following = [None if x is None else x[rows] for x in carried]
        return _swiglu_gradients(grad[rows], gate[rows], up[rows], following, betas, eps)

    (d_gate, d_up), (d_betas,) = _by_rows(of, gate, up)
    return d_gate, d_up, d_betas


def _by_rows(gradients: Callable[[slice], Gradients], *like: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gradients of the tensors `like`, and sums over all rows; by few rows where that is not one compiled pass."""
    if torch.compiler.is_compiling():
        found, sums = gradients(slice(None))
        return [grad.to(x.dtype) for grad, x in zip(found, like, strict=True)], list(sums)
    count, out, parts = len(like[0]), [torch.empty_like(x) for x in like], []
    step = max(1, FEW // like[0].shape[1:].numel())
    for start in range(0, max(count, 1), step):  # experts of a rank may be given no token
        rows = slice(start, start + step)
        found, sums = gradients(rows)
        for whole, grad in zip(out, found, strict=True):
            whole[rows] = grad
        parts.append(sums)
    return out, [torch.stack(same).sum(0) if same[0] is not None else None for same in zip(*parts, strict=True)]


def _swiglu_gradients(
    grad: Tensor, gate: Tensor, up: Tensor, carried: Sequence[Tensor | None], betas: Tensor | None, eps: float
) -> Gradients:
    wide, g, u = grad.float(), gate.float(), up.float()
    of_up, of_gate = F.silu(g).mul_(wide), torch.ops.aten.silu_backward(wide * u, g)
    found = []
    for own, following, y, beta in zip((of_gate, of_up), carried, (g, u), each(betas, 2), strict=True):
        if following is not None:
            following = following.float()
            if beta is not None:
                found.append(_inner(following, y))
            _add_scaled_(own, following, beta, eps)
    return (of_gate, of_up), (torch.stack(found) if found else None,)


def gelu(up: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(up + bias) in its tanh form; up: [..., width], bias: [width] or None."""
    return F.gelu(_plus(up.float(), bias), approximate="tanh").to(up.dtype)


def gelu_backward(
    grad: Tensor, up: Tensor, bias: Tensor | None, carried: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of up, of the bias and of the next layer's beta; `carried` and `beta`: see `add_carried`."""

    def of(rows: slice) -> Gradients:
        return _gelu_gradients(grad[rows], up[rows], bias, None if carried is None else carried[rows], beta, eps)

    (d_up,), (d_bias, d_beta) = _by_rows(of, up)
    return d_up, d_bias if d_bias is None else d_bias.to(up.dtype), d_beta


def _gelu_gradients(
    grad: Tensor, up: Tensor, bias: Tensor | None, carried: Tensor | None, beta: Tensor | None, eps: float
) -> Gradients:
    wide = up.float()
    found = torch.ops.aten.gelu_backward(grad.float(), _plus(wide, bias), approximate="tanh")
    of_bias = None if bias is None else _over_rows(found)
    if carried is None:
        return (found,), (of_bias, None)
    following = carried.float()
    of_beta = None if beta is None else _inner(following, wide, first=(-1,) if bias is None else range(up.dim() - 1))
    return (_add_scaled_(found, following, beta, eps),), (of_bias, of_beta)


def biased(y: Tensor, bias: Tensor) -> Tensor:
    """Y + bias; y: [..., width], bias: [width]."""
    return y + bias  # one rounding, of the sum in fp32


def biased_backward(
    grad: Tensor, carried: Tensor | None, y: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of Y, of the bias, which the next layer does not see, and of the beta; arguments: see `add_carried`."""
    of_y, of_beta = add_carried(grad, carried, y, beta, eps)
    return of_y, _over_rows(grad).to(grad.dtype), of_beta


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.float()


def _over_rows(x: Tensor) -> Tensor:
    """The sum over all but the last dimension, in fp32."""
    return x.sum(tuple(range(x.dim() - 1)), dtype=float32)


def product(gate: Tensor, up: Tensor) -> Tensor:
    """gate up."""
    return gate * up


def product_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    return grad * up, grad * gate


def add_carried(
    grad: Tensor, carried: Tensor | None, y: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """The whole gradient of an output, and that of the next layer's beta.

    Args:
        grad: of the output's use in its own layer.
        carried: of the next layer's output, unscaled; None where the next layer does not use this one.
        y: the output; None without `beta`.
        beta: of the next layer, a scalar in fp32; None where `carried` has been multiplied by s(beta).
    """
    if carried is None:
        return grad, None
    wide = carried.float()
    grad_beta = _inner(wide, y) if beta is not None and y is not None else None
    if grad.dtype != float32:
        return _add_scaled_(grad.float(), wide, beta, eps).to(grad.dtype), grad_beta
    return grad + wide if beta is None else torch.addcmul(grad, wide, signed_scale(beta, eps)), grad_beta


def carried_backward(carried: Tensor, y: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s(beta) G and the gradient of beta, where the previous layer does not do that."""
    wide = carried.float()
    return (wide * signed_scale(beta, eps)).to(y.dtype), _inner(wide, y)


def scaled(previous: Sequence[Tensor], betas: Tensor, eps: float) -> tuple[Tensor, ...]:
    """s(beta) Y_{l-1} of every output, in memory of its own; betas: [positions], fp32."""
    scales = signed_scale(betas, eps).unbind()
    return tuple((y.float() * s).to(y.dtype) for y, s in zip(previous, scales, strict=True))


def unscaled(differences: Sequence[Tensor], betas: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Y_{l-1} from Y_l - Z_l B_l, to rounding; betas: [positions], fp32."""
    scales = signed_scale(betas, eps).unbind()
    return tuple((y.float() / s).to(y.dtype) for y, s in zip(differences, scales, strict=True))


def exponentials_(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row, in fp32, the largest logit m, the sum of exp(logit - m), and the label's logit (0 if elsewhere).

    Args:
        logits: [rows, V]; exp(logit - m) takes their place.
        labels: columns, [rows]; any other number for a label that is elsewhere.
    """
    wide, here = logits.float(), (labels >= 0) & (labels < logits.shape[-1])
    largest = wide.amax(-1)
    at_label = wide.gather(-1, labels.where(here, 0).unsqueeze(-1)).squeeze(-1).where(here, 0.0)
    exps = wide.sub_(largest.unsqueeze(-1)).exp_()
    total = exps.sum(-1)
    logits.copy_(exps)
    return largest, total, at_label


def logit_gradient_(exps: Tensor, labels: Tensor, share: Tensor, grad: Tensor) -> None:
    """Replace exps by the logits' gradient, (softmax - one_hot) grad, where softmax is exps times `share`, [rows]."""
    weighted = exps.float().mul_((share * grad).unsqueeze(-1))
    if torch.compiler.is_compiling():
        # in the same pass, where an indexed update would be another
        columns = torch.arange(exps.shape[-1], device=exps.device)
        weighted = torch.where(columns == labels.unsqueeze(-1), weighted - grad.unsqueeze(-1), weighted)
    else:
        here = (labels >= 0) & (labels < exps.shape[-1])
        weighted.scatter_add_(-1, labels.where(here, 0).unsqueeze(-1), -grad.where(here, 0.0).unsqueeze(-1))
    exps.copy_(weighted)


def accumulate_(total: Tensor, grad: Tensor) -> None:
    """Add a gradient to the sum in fp32; both flat."""
    total.add_(grad)


def each(values: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """The values of a vector, or None `count` times."""
    return [None] * count if values is None else values.unbind()


def _add_scaled_(grad: Tensor, carried: Tensor, beta: Tensor | None, eps: float) -> Tensor:
    """In place; both fp32."""
    return grad.add_(carried) if beta is None else grad.addcmul_(carried, signed_scale(beta, eps))


def _inner(one: Tensor, other: Tensor, first: Sequence[int] = (-1,)) -> Tensor:
    """<one, other>; compiled, over these dimensions first, so that it shares a pass with what else is made of them."""
    if torch.compiler.is_compiling():
        # flat, as the order of a sum over two dimensions would be that of their strides
        return (one * other.float()).sum(tuple(first)).flatten().sum()
    return dot(one.flatten(), other.float().flatten())


@dataclass(frozen=True)
class Glue:
    """The functions above, as they are or compiled."""

    norm: Callable[..., Any] = norm
    norm_backward: Callable[..., Any] = norm_backward
    layer_norm: Callable[..., Any] = layer_norm
    layer_norm_backward: Callable[..., Any] = layer_norm_backward
    rotate: Callable[..., Any] = rotate
    rotate_backward: Callable[..., Any] = rotate_backward
    norm_rotate: Callable[..., Any] = norm_rotate
    norm_rotate_backward: Callable[..., Any] = norm_rotate_backward
    swiglu: Callable[..., Any] = swiglu
    swiglu_backward: Callable[..., Any] = swiglu_backward
    gelu: Callable[..., Any] = gelu
    gelu_backward: Callable[..., Any] = gelu_backward
    biased: Callable[..., Any] = biased
    biased_backward: Callable[..., Any] = biased_backward
    product: Callable[..., Any] = product
    product_backward: Callable[..., Any] = product_backward
    add_carried: Callable[..., Any] = add_carried
    carried_backward: Callable[..., Any] = carried_backward
    scaled: Callable[..., Any] = scaled
    unscaled: Callable[..., Any] = unscaled
    exponentials_: Callable[..., Any] = exponentials_
    logit_gradient_: Callable[..., Any] = logit_gradient_
    accumulate_: Callable[..., Any] = accumulate_

    def map(self, change: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Glue:
        """With every function changed."""
        return Glue(**{field.name: change(field.name, getattr(self, field.name)) for field in fields(self)})


EAGER = Glue()
