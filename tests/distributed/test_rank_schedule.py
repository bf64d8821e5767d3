"""Ranks that change in a run, in every kind of layout, against plain PyTorch that changes them by a full SVD.

At given steps, or when the energy of their products crosses a threshold: at the same step as in plain PyTorch, which
measures the singular values of whole products.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_crnet.config.megatron import build_transformer_config
from megatron_crnet.config.phases import Phase, next_model, phase_at
from megatron_crnet.config.positions import position_table
from megatron_crnet.config.rank_section import RankScheduleConfig
from megatron_crnet.config.schema import Config, ModelConfig
from megatron_crnet.engine import rank_change
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.engine.rank_change import A, B, change_ranks, name_of_b, reductions
from megatron_crnet.engine.spectrum import crosses, leading_share
from megatron_crnet.engine.state_kinds import KINDS, MASTER
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.model.reference import ReferenceCRNet
from megatron_crnet.model.weights import Weight, initial_value
from tests.distributed.engines import build_engine, close_engine
from tests.distributed.layouts import shortened
from tests.distributed.spawn import run_distributed
from tests.distributed.test_layouts import EP, EP_4, MOE, PARTITION_EVERYTHING, Layout
from tests.helpers import (
    PADDED,
    local_weights,
    micro_batches,
    plain_losses,
    random_mask,
    reference_model,
    relative_error,
)

GROWN = {"q": [8, 12, 12, 9], "k": 10, "v": 6, "o": 11, "gate": [8, 9, 10, 11], "up": 8, "down": 12}
SHRUNK = {"q": 4, "k": 5, "v": 6, "o": 7, "gate": 3, "up": 6, "down": 5}
SCHEDULE = RankScheduleConfig([2, 4], [GROWN, SHRUNK])
LESS = {"q": [6, 5, 4, 4], "k": 5, "v": 6, "o": [6, 5, 5, 4], "gate": 5, "up": [6, 6, 5, 4], "down": 4}
# between the shares that LESS keeps after steps 2 and 3, 1e-4 and 4e-5 apart
DENSE, EXPERTS = (RankScheduleConfig([], [LESS, GROWN], energy=e, check_interval=1) for e in (0.90794, 0.93285))
SPARSE = {**MOE, "rank": 6, "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}
STEPS = 6
TWO = [
    Layout(tp=2, sp=False, zero=3, model={"rank": 6}, keys=PARTITION_EVERYTHING),
    Layout(pp=2, vpp=2, zero=1, model={"rank": 6}),
    # with larger initial values, a gradient norm in fp32 moves by 1e-4 in six steps of plain PyTorch as well
    Layout(zero=2, model={"rank": 6, "variant": "low_rank", "init_method_std": 0.05}),
    Layout(tp=2, zero=1, dtype="bf16", model={"rank": 6}),
    Layout(tp=2, model={**PADDED, "rank": 6}),
    Layout(zero=1, model=SPARSE, parallel=EP),
]
ROWS = [
    *((row, SCHEDULE) for row in shortened(TWO)),
    # stages, replicas and tensor-parallel ranks add up what they hold, each map once
    (TWO[1], DENSE),
    (TWO[-1], EXPERTS),
]
FOUR = [
    (Layout(tp=2, pp=2, vpp=2, zero=1, model={"rank": 6}), DENSE),
    (Layout(tp=2, zero=3, model={"rank": 6}, keys=PARTITION_EVERYTHING), DENSE),
    *((Layout(zero=zero, model={"rank": 6}), DENSE) for zero in (0, 2)),
    *((Layout(tp=2, zero=1, model=SPARSE, parallel=parallel), EXPERTS) for parallel in ({}, EP, EP_4)),
    (Layout(pp=2, zero=1, model=SPARSE, parallel=EP), EXPERTS),
]
Row = tuple[Layout, RankScheduleConfig]
Measured = list[tuple[float, ...]]
"""Of each step: loss, gradient norm, and the share of the energy where it is measured."""
Made = dict[str, tuple[Tensor, tuple[slice, ...]]]
"""By the name of a weight, for both factors that of A: this rank's part, and where that is in the whole."""


def scheduled(row: Row) -> Config:
    config = row[0].config()
    training = dataclasses.replace(config.training, train_steps=STEPS)
    return dataclasses.replace(config, training=training, rank_schedule=row[1])


def name_of(row: Row) -> str:
    return f"{row[0]}-{'steps' if row[1] is SCHEDULE else 'energy'}"


def other_signs(gram_a: Tensor, gram_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What another rank may find: the same best approximation by factors of other signs."""
    p, q = reductions(gram_a, gram_b, rank)
    return -p, -q


def train(rows: list[Row]) -> list[tuple[Measured, Made]]:
    if dist.get_rank():
        rank_change.reductions = other_signs
    return [_train(scheduled(row)) for row in rows]


def _train(config: Config) -> tuple[Measured, Made]:
    changes: list[int] = []
    engine, measured = build_engine(phase_at(config, 0).config), []
    for step in range(STEPS):
        batches = micro_batches(config, engine.context.dp_rank, engine.context.world_size, step)
        loss = engine.forward_backward(batches, int(random_mask(config, step).sum()))
        measured.append((loss, engine.update()[0]))
        if following := next_model(config, step + 1, changes):
            share = leading_share(engine.zero, engine.chunks, position_table(following))
            measured[-1] = (*measured[-1], share)
            if crosses(share, config.rank_schedule.energy or 0.0, bool(changes)):  # LESS, then GROWN
                changes.append(step + 1)
        phase = phase_at(config, step + 1, changes)
        if phase.start == step + 1:
            engine = _change(engine, phase)
    made = _made(engine)
    close_engine(engine)
    return measured, made


def _made(engine: TrainEngine) -> Made:
    """Weights after the last step: of factors their product, which does not depend on how a change has turned them."""
    states, weights, found = engine.states(), {weight.name: weight for weight in local_weights(engine)}, Made()
    for name, weight in weights.items():
        value, where = states[name][MASTER], [_place(weight, dim) for dim in range(len(weight.shape))]
        if name.endswith(A):
            value, where[0] = states[name_of_b(name)][MASTER] @ value, _place(weights[name_of_b(name)], 0)
        if not name.endswith(B):
            found[name] = value, tuple(where)
    return found


def _place(weight: Weight, dim: int) -> slice:
    return slice(weight.span.start, weight.span.stop) if weight.shard_dim == dim else slice(None)


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


def plain(config: Config, transformer: Any) -> tuple[Measured, dict[str, Tensor]]:
    phase, schedule, changes, measured = phase_at(config, 0), config.rank_schedule, list[int](), list[Any]()
    model = reference_model(phase.config, transformer)
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in model.named_parameters()}
    for step in range(STEPS):
        measured.append(_plain_step(model, moments, config, step))
        if schedule.energy and len(changes) < 2 and step + 1 < STEPS:
            following = dataclasses.replace(config.model, rank=schedule.ranks[len(changes)])
            share = plain_share(model, phase.config.model, following)
            measured[-1] = (*measured[-1], share)
            if share <= schedule.energy if changes else share >= schedule.energy:
                changes.append(step + 1)
        phase = phase_at(config, step + 1, changes)
        if phase.start == step + 1:
            model, moments = _changed(model, moments, phase, transformer)
    assert not schedule.energy or changes == [3, 4]
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    made = {n: weights[name_of_b(n)] @ w if n.endswith(A) else w for n, w in weights.items() if not n.endswith(B)}
    return measured, made


def plain_share(model: ReferenceCRNet, before: ModelConfig, after: ModelConfig) -> float:
    """What a smaller rank keeps of the squared singular values of whole products, or the first half of one that is to
    grow holds."""
    table, following, leading, total = position_table(before), position_table(after), 0.0, 0.0
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    for name in (name for name in weights if name.endswith(".a.weight")):
        layer, position = int(name.split(".")[2]), table.position_of(name)
        old, new = table.ranks[layer][position], following.ranks[layer][position]
        if old != new:
            squares = torch.linalg.svdvals(weights[name.replace(".a.", ".b.")] @ weights[name]).square()
            leading += float(squares[: new if new < old else math.ceil(old / 2)].sum())
            total += float(squares.sum())
    return leading / total


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


Together = dict[str, list[tuple[Measured, Made]]]
"""By row, of each rank."""


def measured_together(rows: list[Row], world_size: int) -> Together:
    ranks = run_distributed(train, world_size, rows, timeout_s=600)
    return dict(zip(map(name_of, rows), map(list, zip(*ranks, strict=True)), strict=True))


def check(row: Row, together: Together) -> None:
    config, ranks = scheduled(row), together[name_of(row)]
    (wanted, whole), bound = plain(config, build_transformer_config(config)), 1e-5 if row[0].dtype == "fp32" else 5e-2
    for measured, _ in ranks:
        for step, (found, right) in enumerate(zip(measured, wanted, strict=True)):
            assert found == pytest.approx(right, rel=bound), step
        assert [step[2:] for step in measured] == [step[2:] for step in ranks[0][0]]  # one decision for all
    parts = [(name, *part) for _, made in ranks for name, part in made.items()]
    assert {name for name, *_ in parts} == whole.keys()
    assert relative_error((name, part, whole[name][where], whole[name]) for name, part, where in parts) < bound


@pytest.fixture(scope="module")
def two() -> Together:
    return measured_together(ROWS, 2)


@pytest.fixture(scope="module")
def four() -> Together:
    return measured_together(FOUR, 4)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_ranks_change_as_in_plain_pytorch(row: Row, two: Together) -> None:
    check(row, two)


@pytest.mark.long
@pytest.mark.parametrize("row", FOUR, ids=name_of)
def test_ranks_change_by_energy_on_more_ranks_as_in_plain_pytorch(row: Row, four: Together) -> None:
    check(row, four)
