"""Alternatives that the package does not offer, trained in plain PyTorch and compared with what it does.

    python examples/studies/alternatives.py --seeds 1234 1 > runs/alternatives.jsonl

Of experts (docs/decisions/experts.md): `unchained` is what the package trains; `combined` chains the experts' combined
output; `each` chains gate, up and down of expert e where the token was given to expert e in the layer before, too. Of
beta: `per_position` is what the package trains; `per_layer` shares one beta among the positions of a layer. Prints a
JSON line per run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_crnet import Config, load_config
from megatron_crnet.config.megatron import build_transformer_config
from megatron_crnet.data.indexed import read_index
from megatron_crnet.distributed import cpu_backend
from megatron_crnet.engine.optimizer import lr_multiplier
from megatron_crnet.model.glue import signed_scale
from megatron_crnet.model.reference import CrossLayerLinear, MixtureOfExperts, ReferenceCRNet
from megatron_crnet.model.weights import initial_value

DENSE = {
    "model.num_layers": 6,
    "model.hidden_size": 128,
    "model.ffn_hidden_size": 344,
    "model.rank": 32,
    "training.train_steps": 146,
    "optimizer.lr_warmup_steps": 15,
}
EXPERTS = {
    **DENSE,
    "model.architecture": "qwen3_moe",
    "model.ffn_hidden_size": 96,
    "model.num_experts": 8,
    "model.moe_router_topk": 2,
    "model.moe_aux_loss_coeff": 0.01,
}


class Combined(MixtureOfExperts):
    """s(beta) Y_prev + sum p_e E_e(x), Y_prev what this gave in the layer before."""

    beta: Tensor
    previous: tuple[Combined, ...]

    def forward(self, x: Tensor) -> Tensor:
        """As the base class; keeps the output for the next layer."""
        self.output = super().forward(x)
        if self.previous:
            (before,) = self.previous
            self.output = signed_scale(self.beta, self.model.cross_layer_epsilon) * before.output + self.output
        return self.output


class Each(MixtureOfExperts):
    """Expert e adds s(beta) times its output of the layer before to gate, up and down; 0 where it was not chosen."""

    previous: tuple[Each, ...]

    def forward(self, x: Tensor) -> Tensor:
        """As the base class; keeps every expert's outputs for the next layer."""
        self.logits = logits = F.linear(x, self.gate.weight)
        top, self.chosen = logits.topk(self.model.moe_router_topk)
        weights, y = top.softmax(-1), torch.zeros_like(x)
        self.outputs: list[dict[str, Tensor]] = []
        for number, expert in enumerate(self.experts):
            is_chosen = (self.chosen == number).any(-1, keepdim=True)
            before = self.previous[0].outputs[number] if self.previous else {}
            linears: dict[str, nn.Module] = dict(expert.named_children())
            gate, up = (linears[name](x, before.get(name)) for name in ("gate_proj", "up_proj"))
            down = linears["down_proj"](F.silu(gate) * up, before.get("down_proj"))
            found = {"gate_proj": gate, "up_proj": up, "down_proj": down}
            self.outputs.append({name: output * is_chosen for name, output in found.items()})
            y = y + (weights * (self.chosen == number)).sum(-1, keepdim=True) * down
        return y


def chain(model: ReferenceCRNet, kind: type[MixtureOfExperts]) -> None:
    """Chain the model's experts in this way, with a beta for each chain."""
    mixtures: list[Any] = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    before: tuple[Any, ...] = ()  # a tuple, as PyTorch would take the module itself for a part of this one
    for mixture in mixtures:
        mixture.__class__ = kind
        if before and kind is Combined:
            mixture.beta = nn.Parameter(torch.empty(()))
        elif before:
            for linear in linears_of(mixture):
                linear.beta = nn.Parameter(torch.empty(()))
        mixture.previous, before = before, (mixture,)


def share_betas(model: ReferenceCRNet) -> None:
    """Give all positions of a layer one beta."""
    for layer in model.model["layers"].children():
        chained = [linear for linear in linears_of(layer) if linear.beta is not None]
        for linear in chained:
            linear.beta = chained[0].beta


def linears_of(module: nn.Module) -> list[CrossLayerLinear]:
    """The linear maps of a part of the model."""
    return [linear for linear in module.modules() if isinstance(linear, CrossLayerLinear)]


WAYS: dict[str, tuple[dict[str, Any], Callable[[ReferenceCRNet], None] | None]] = {
    "experts unchained": (EXPERTS, None),
    "experts combined": (EXPERTS, partial(chain, kind=Combined)),
    "experts each": (EXPERTS, partial(chain, kind=Each)),
    "beta per_position": (DENSE, None),
    "beta per_layer": (DENSE, share_betas),
}


def build(config: Config, change: Callable[[ReferenceCRNet], None] | None) -> ReferenceCRNet:
    """The changed model with the package's initial values."""
    model = ReferenceCRNet(config.model)
    if change is not None:
        change(model)
    about, seed = build_transformer_config(config), config.training.seed
    values = {name: initial_value(name, tuple(v.shape), about, seed) for name, v in model.state_dict().items()}
    model.load_state_dict(values)
    return model


def batches(prefix: str, size: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels, [size, length] each, from windows in random order."""
    ids = read_index(prefix).ids()
    order = torch.randperm((len(ids) - 1) // length, generator=torch.Generator().manual_seed(seed))
    for chosen in order.split(size):
        text = torch.stack([torch.from_numpy(ids[i * length : (i + 1) * length + 1].astype("int64")) for i in chosen])
        yield text[:, :-1], text[:, 1:]


def train(config: Config, change: Callable[[ReferenceCRNet], None] | None) -> dict[str, Any]:
    """One run; validation loss over 64 batches, without what balances the experts."""
    training, section = config.training, config.optimizer
    model, started = build(config, change), time.perf_counter()
    groups = [
        {
            "params": [weight],
            "lr": section.lr * lr_multiplier(name, section.lr_multipliers),
            "weight_decay": section.weight_decay if weight.dim() > 1 else 0.0,
        }
        for name, weight in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(section.adam_beta1, section.adam_beta2), eps=section.adam_eps)
    warmup, steps = section.lr_warmup_steps, training.train_steps
    left = steps - warmup
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * max(0, step + 1 - warmup) / left)),
    )
    size, length = training.micro_batch_size, training.seq_length
    data = batches(str(config.data.train_data_path[0]), size, length, training.seed)
    for _, (tokens, labels) in zip(range(steps), data, strict=False):
        loss = model.loss(tokens, labels) + model.auxiliary_loss(size)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), section.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        judged = zip(range(64), batches(str(config.data.valid_data_path[0]), size, length, 0), strict=False)
        losses = [float(model.loss(tokens, labels)) for _, (tokens, labels) in judged]
    return {
        "lr": section.lr,
        "seed": training.seed,
        "validation_loss": sum(losses) / len(losses),
        "train_loss": float(loss.detach()),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Every way with every rate and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--lr", nargs="+", type=float, default=[0.006])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234])
    args = parser.parse_args()
    cpu_backend.install()
    torch.set_num_threads(1)  # of products this small
    for seed, lr, way in itertools.product(args.seeds, args.lr, args.ways):
        about, change = WAYS[way]
        options = {**about, "training.seed": seed, "optimizer.lr": lr}
        config = load_config("examples/quickstart.yaml", [f"--{name}={value}" for name, value in options.items()])
        print(json.dumps({"way": way, **train(config, change)}), flush=True)


if __name__ == "__main__":
    main()
