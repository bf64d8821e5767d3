"""The linear maps of CR-Net, and how LoRA adapters are merged into them. Travels with every export.

This file needs configuration_crnet.py and torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_crnet import CRNetConfig


class Factor(nn.Module):
    """A or B of a low-rank map. Not an nn.Linear, so that `target_modules="all-linear"` adapts whole maps.

    Args:
        std: of its initial values.
    """

    def __init__(self, h_in: int, h_out: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(h_out, h_in))
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h_in]. Returns [b, s, h_out]."""
        return F.linear(x, self.weight)


class NoDenseWeight:
    """In place of an nn.Linear's matrix: device, dtype and shape, but no values.

    Raises:
        AttributeError: a tool reads or writes values, to merge, quantize or decompose the matrix.
    """

    def __init__(self, a: Tensor, shape: tuple[int, int]) -> None:
        self.device, self.dtype, self.shape = a.device, a.dtype, torch.Size(shape)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a low-rank map of CR-Net has no dense weight ({name} was asked of it): LoRA adapters merge by "
            "merge_and_unload, other changes of the matrix are not possible"
        )


class CrossLayerLinear(nn.Linear):
    """One low-rank linear map of one layer: s(beta) Y_previous + X A B, X A B, or B silu(X A).

    An nn.Linear for libraries that wrap linear maps, such as peft: what they add to its output goes to the next layer
    with it. A bias does not: the layer adds it to what it uses (`layer_crnet.used`).
    """

    def __init__(self, config: CRNetConfig, layer: int, position: str, h_in: int, h_out: int) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a matrix
        self.in_features, self.out_features = h_in, h_out
        self.register_parameter("bias", nn.Parameter(torch.zeros(h_out)) if config.traits.has_biases else None)
        self.eps, self.nonlinear = config.cross_layer_epsilon, config.variant == "cola"
        rank = config.rank_of(layer, position)
        self.a = Factor(h_in, rank, h_in**-0.5)
        # A B then looks like a matrix of std initializer_range
        std = config.initializer_range * config.std_factor(position)
        self.b = Factor(rank, h_out, std * (h_in / rank) ** 0.5)
        # fp32 in every model: a step of 1e-3 at 1 is lost in bf16
        has_previous = config.has_previous(layer, position)
        self.beta = nn.Parameter(torch.full((), config.beta_init, dtype=torch.float32)) if has_previous else None

    @property  # type: ignore[override]
    def weight(self) -> NoDenseWeight:
        """In place of a dense matrix."""
        return NoDenseWeight(self.a.weight, (self.out_features, self.in_features))

    @weight.setter
    def weight(self, value: NoDenseWeight) -> None:
        # peft gives a module its own weight back when it takes an adapter away
        if not isinstance(value, NoDenseWeight):
            raise AttributeError("a low-rank map of CR-Net has no dense weight, and takes none: change a and b")

    def forward(self, x: Tensor, previous: Tensor | None = None) -> Tensor:
        """x: [b, s, h_in]; previous: [b, s, h_out]."""
        z = self.a(x)
        y = self.b(F.silu(z) if self.nonlinear else z)
        if self.beta is None:
            return y
        if previous is None:
            raise ValueError("this layer needs the outputs of the one before, which hands none on: keep their order")
        scale = torch.where(self.beta < 0, self.beta - self.eps, self.beta + self.eps)  # sign(0) counts as +1
        wide = torch.promote_types(y.dtype, torch.float32)
        return torch.addcmul(y.to(wide), previous.to(wide), scale.to(wide)).to(y.dtype)

    @torch.no_grad()
    def widen(self, down: Tensor, up: Tensor) -> None:
        """Add X down^T up^T to the output by more columns of A and rows of B: down [r, h_in], up [h_out, r]."""
        for factor, more, dim in ((self.a, down, 0), (self.b, up, 1)):
            old = factor.weight
            factor.weight = nn.Parameter(torch.cat((old, more.to(old)), dim), requires_grad=old.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CrossLayerLinear:
        # model.to(torch.bfloat16), model.half()
        exact = None if self.beta is None else self.beta.data
        super()._apply(fn, recurse)
        if self.beta is not None and exact is not None and self.beta.dtype in (torch.float16, torch.bfloat16):
            self.beta.data = exact.to(self.beta.device)
        return self


class FullRankLinear(nn.Linear):
    """X W, which ignores the previous layer; its bias is added by the layer.

    Args:
        std: of its initial values.
    """

    def __init__(self, h_in: int, h_out: int, std: float, bias: bool) -> None:
        super().__init__(h_in, h_out, bias=bias)
        self.std = std

    def forward(self, x: Tensor, previous: Tensor | None = None) -> Tensor:
        """x: [b, s, h_in]. Returns [b, s, h_out]."""
        return F.linear(x, self.weight)


def linear_map(config: CRNetConfig, layer: int, position: str, h_in: int, h_out: int) -> nn.Linear:
    """The linear map of a position of a layer."""
    if config.rank_of(layer, position):
        return CrossLayerLinear(config, layer, position, h_in, h_out)
    std = config.initializer_range * config.std_factor(position)
    return FullRankLinear(h_in, h_out, std, config.traits.has_biases)


def base_layer(module: nn.Module) -> nn.Module | None:
    """What a module of peft's wraps."""
    return getattr(module, "base_layer", None)


def adapter_deltas(name: str, module: Any, adapter_names: list[str] | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The two matrices of each active adapter of a wrapped map: [r, h_in], and [h_out, r] with its scale."""
    for adapter in adapter_names or module.active_adapters:
        if module.base_layer.nonlinear:
            why = "cola has a nonlinearity between A and B"
        elif not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            why = f"{type(module).__name__} is not LoRA, and the map has no dense weight"
        elif adapter not in module.lora_A:
            continue
        elif adapter in module.lora_variant or module.lora_bias.get(adapter):
            why = "it is a variant of LoRA or has a bias, and the map has no dense weight"
        else:
            down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight * module.scaling[adapter]
            if down.isfinite().all() and up.isfinite().all():
                yield down, up
                continue
            why = "its values are not finite"
        raise ValueError(f"adapter {adapter} cannot be merged into {name} ({why}): keep it beside the model")
