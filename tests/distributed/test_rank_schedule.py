"""Ranks that change in a run, in every kind of layout, against plain PyTorch that changes them by a full SVD."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_crnet.config.megatron import build_transformer_config
from megatron_crnet.config.phases import Phase, phases_of
from megatron_crnet.config.rank_section import RankScheduleConfig
from megatron_crnet.config.schema import Config
from megatron_crnet.engine import rank_change
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.engine.rank_change import change_ranks, reductions
from megatron_crnet.engine.state_kinds import KINDS
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.model.reference import ReferenceCRNet
from megatron_crnet.model.weights import initial_value
from tests.distributed.engines import build_engine, close_engine
from tests.distributed.spawn import run_distributed
from tests.distributed.test_layouts import EP, MOE, PARTITION_EVERYTHING, Layout
from tests.helpers import PADDED, micro_batches, plain_losses, random_mask, reference_model

GROWN = {"q": [8, 12, 12, 9], "k": 10, "v": 6, "o": 11, "gate": [8, 9, 10, 11], "up": 8, "down": 12}
SHRUNK = {"q": 4, "k": 5, "v": 6, "o": 7, "gate": 3, "up": 6, "down": 5}
SCHEDULE = RankScheduleConfig([2, 4], [GROWN, SHRUNK])
STEPS = 6
TWO = [
    Layout(tp=2, model={"rank": 6}),
    Layout(tp=2, sp=False, zero=3, model={"rank": 6}, keys=PARTITION_EVERYTHING),
    Layout(pp=2, vpp=2, zero=1, model={"rank": 6}),
    # with larger initial values, a gradient norm in fp32 moves by 1e-4 in six steps of plain PyTorch as well
    Layout(zero=2, model={"rank": 6, "variant": "low_rank", "init_method_std": 0.05}),
    Layout(tp=2, zero=1, dtype="bf16", model={"rank": 6}),
    Layout(tp=2, model={**PADDED, "rank": 6}),
    Layout(tp=2, zero=1, model={**MOE, "rank": 6, "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}, parallel=EP),
    Layout(zero=1, model={**MOE, "rank": 6, "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}, parallel=EP),
]


def scheduled(row: Layout) -> Config:
    config = row.config()
    training = dataclasses.replace(config.training, train_steps=STEPS)
    return dataclasses.replace(config, training=training, rank_schedule=SCHEDULE)


def other_signs(gram_a: Tensor, gram_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What another rank may find: the same best approximation by factors of other signs."""
    p, q = reductions(gram_a, gram_b, rank)
    return -p, -q


def train(rows: list[Layout]) -> list[list[tuple[float, float]]]:
    """Loss and gradient norm of each step."""
    if dist.get_rank():
        rank_change.reductions = other_signs
    return [_train(scheduled(row)) for row in rows]


def _train(config: Config) -> list[tuple[float, float]]:
    first, *later = phases_of(config)
    engine, measured = build_engine(first.config), []
    for phase in (first, *later):
        if phase is not first:
            engine = _change(engine, phase)
        for step in range(phase.start, phase.stop):
            batches = micro_batches(config, engine.context.dp_rank, engine.context.world_size, step)
            loss = engine.forward_backward(batches, int(random_mask(config, step).sum()))
            measured.append((loss, engine.update()[0]))
    close_engine(engine)
    return measured


def _change(engine: TrainEngine, phase: Phase) -> TrainEngine:
    states, steps = engine.states(KINDS), engine.zero.steps
    engine.close()
    engine.zero.release()
    following = TrainEngine(phase.config, build_model_chunks(phase.config), engine.context)
    for chunk in following.chunks:
        change_ranks(states, chunk, phase.config.training.seed, engine.context.device)
    following.start_from(states, steps)
    following.restore_schedule(phase.start)
    return following


def plain(config: Config, transformer: Any) -> list[tuple[float, float]]:
    first, *later = phases_of(config)
    model, measured = reference_model(first.config, transformer), []
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in model.named_parameters()}
    for phase in (first, *later):
        if phase is not first:
            model, moments = _changed(model, moments, phase, transformer)
        measured += [_plain_step(model, moments, config, step) for step in range(phase.start, phase.stop)]
    return measured


def _plain_step(
    model: ReferenceCRNet, moments: dict[str, tuple[Tensor, Tensor]], config: Config, step: int
) -> tuple[float, float]:
    """One step of AdamW, written out, with the moments at hand."""
    section = config.optimizer
    model.zero_grad()
    loss = plain_losses(model, None, config, step)["loss"]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_grad)
    lr = section.lr * min(1.0, (step + 1) / section.lr_warmup_steps)
    if step + 1 > section.lr_warmup_steps:
        lr = cosine(config, step + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            m, v = moments[name]
            assert p.grad is not None
            m.lerp_(p.grad, 1 - section.adam_beta1)
            v.lerp_(p.grad.square(), 1 - section.adam_beta2)
            if p.dim() >= 2:
                p.mul_(1 - lr * section.weight_decay)
            corrected = m / (1 - section.adam_beta1 ** (step + 1))
            p.sub_(lr * corrected / ((v / (1 - section.adam_beta2 ** (step + 1))).sqrt() + section.adam_eps))
    return float(loss), float(norm)


def cosine(config: Config, step: int) -> float:
    section, steps = config.optimizer, config.training.train_steps
    share = (step - section.lr_warmup_steps) / (steps - section.lr_warmup_steps)
    low = section.lr * section.min_lr_ratio
    return low + (section.lr - low) * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * share, dtype=torch.float64))))


def _changed(
    model: ReferenceCRNet, moments: dict[str, tuple[Tensor, Tensor]], phase: Phase, transformer: Any
) -> tuple[ReferenceCRNet, dict[str, tuple[Tensor, Tensor]]]:
    following = ReferenceCRNet(phase.config.model).double()
    before, after = dict(model.named_parameters()), {n: p.detach() for n, p in following.named_parameters()}
    found = dict(moments)
    for name, p in after.items():
        if not name.endswith((".a.weight", ".b.weight")):
            p.copy_(before[name].detach())
    for name, new_a in ((n, p) for n, p in after.items() if n.endswith(".a.weight")):
        of_b = name.replace(".a.", ".b.")
        a, b, rank = before[name].detach(), before[of_b].detach(), len(new_a)
        if rank >= len(a):
            drawn = initial_value(name, tuple(new_a.shape), transformer, phase.config.training.seed).double()
            new_a.copy_(torch.cat([a, drawn[len(a) :]]))
            after[of_b].copy_(torch.cat([b, b.new_zeros(len(b), rank - len(a))], 1))
            found[name] = tuple(torch.cat([m, m.new_zeros(rank - len(a), m.shape[1])]) for m in moments[name])
            found[of_b] = tuple(torch.cat([m, m.new_zeros(len(m), rank - len(a))], 1) for m in moments[of_b])
            continue
        u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
        root = s[:rank].sqrt()
        new_a.copy_(root[:, None] * v[:rank])
        after[of_b].copy_(u[:, :rank] * root)
        p, q = new_a @ torch.linalg.pinv(a), torch.linalg.pinv(b) @ after[of_b]
        found[name] = p @ moments[name][0], p.square() @ moments[name][1]
        found[of_b] = moments[of_b][0] @ q, moments[of_b][1] @ q.square()
    return following, found


@pytest.fixture(scope="module")
def two() -> dict[str, list[tuple[float, float]]]:
    return dict(zip(map(str, TWO), run_distributed(train, 2, TWO, timeout_s=600)[0], strict=True))


@pytest.mark.parametrize("row", TWO, ids=str)
def test_ranks_change_as_in_plain_pytorch(row: Layout, two: dict[str, list[tuple[float, float]]]) -> None:
    config = scheduled(row)
    wanted, bound = plain(config, build_transformer_config(config)), 1e-5 if row.dtype == "fp32" else 5e-2
    for step, (found, right) in enumerate(zip(two[str(row)], wanted, strict=True)):
        assert found == pytest.approx(right, rel=bound), step
