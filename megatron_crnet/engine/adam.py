"""What the optimizers of this project share: a loop over parameters, and AdamW for those that are not special."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_crnet.engine.state_kinds import MOMENTS

ParamGroup = dict[str, Any]


class PerParameterOptimizer(torch.optim.Optimizer):
    """Updates one parameter after the other, each by `update`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, group)

    def update(self, parameter: Tensor, gradient: Tensor, group: ParamGroup) -> None:
        """Update one tensor."""
        raise NotImplementedError

    def update_by_adamw(self, parameter: Tensor, gradient: Tensor, group: ParamGroup) -> None:
        """Update one tensor as `torch.optim.AdamW` does."""
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            state |= {kind: torch.zeros_like(parameter, requires_grad=False) for kind in MOMENTS}
        first, second = (state[kind] for kind in MOMENTS)
        (beta1, beta2), options = group["betas"], {name: group[name] for name in ("lr", "weight_decay", "eps")}
        options |= {"amsgrad": False, "maximize": False}
        adamw([parameter], [gradient], [first], [second], [], [state["step"]], beta1=beta1, beta2=beta2, **options)
