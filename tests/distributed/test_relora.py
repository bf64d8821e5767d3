"""ReLoRA on every layout and ZeRO stage against its page of plain PyTorch, over restarts."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_crnet.checkpoint.manager import Checkpointer
from megatron_crnet.checkpoint.train_state import TrainingState
from megatron_crnet.checkpoint.weight_files import CheckpointWeights
from megatron_crnet.config.phases import phases_of
from megatron_crnet.config.schema import CheckpointConfig, Config, ReloraConfig
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.engine.relora import restart
from megatron_crnet.engine.state_kinds import KINDS, MASTER, MOMENTS
from megatron_crnet.model.gpt import build_model_chunks
from tests.distributed.engines import build_engine, close_engine
from tests.distributed.layouts import BF16_BOUNDS, Sizes, check, measure, shortened
from tests.distributed.spawn import run_distributed
from tests.distributed.test_layouts import EP, EP_4, PARTITION_EVERYTHING, TO_ALL
from tests.helpers import (
    ARCHITECTURES,
    Errors,
    local_weights,
    micro_batches,
    random_mask,
    tiny_config,
)

RELORA: dict[str, Any] = {"variant": "relora", "rank": {"q": 8, "k": 7, "v": 6, "o": 5, "gate": 8, "up": 8, "down": 4}}
PADDED = {"variant": "relora", "ffn_hidden_size": 125, "rank": 31}
GPT2, QWEN3, MOE = ({"variant": "relora", "rank": 8, **ARCHITECTURES[name]} for name in ("gpt2", "qwen3", "qwen3_moe"))
PADDED_MOE = {**MOE, **PADDED, "num_query_groups": 4}
MOE_TO_ALL = {**TO_ALL, "variant": "relora", "rank": 8}
# B is a few updates of Adam's after a restart, whose signs bf16 decides where gradients are small; for the same reason
# moments are pruned at random in bf16: which are the largest is rounding
BF16 = dataclasses.replace(BF16_BOUNDS, parameters=0.15)
FROZEN = {
    "llama": "model.layers.2.mlp.up_proj.weight",
    "qwen3_moe": "model.layers.2.mlp.experts.3.up_proj.weight",
}
STEPS = 5
"""With two restarts."""


@dataclass(frozen=True)
class Row(Sizes):
    """Sizes of parallelism, and how moments are pruned."""

    prune: str = "magnitude"
    model: dict[str, Any] = field(default_factory=lambda: RELORA, hash=False)
    parallel: dict[str, Any] = field(default_factory=dict, hash=False)

    def config(self) -> Config:
        return tiny_config(
            self.model,
            {**self.parallel_section, **self.parallel},
            {"dtype": self.dtype, "train_steps": 100, "global_batch_size": self.sequences},
            {"lr_decay_style": "cosine_restarts", "lr_restart_interval": 2, "lr_restart_warmup_steps": 2},
            self.deepspeed_section,
            relora={"restart_interval": 2, "prune": self.prune, "prune_share": 0.8},
        )


ON_TWO = [
    Row(zero=2),
    Row(pp=2, zero=1, prune="random"),
    Row(tp=2, zero=1, model=PADDED),
    Row(pp=2, vpp=2, model={**RELORA, "full_rank_layers": [0]}),
    Row(tp=2, zero=3, dtype="bf16", prune="random", keys=PARTITION_EVERYTHING),
    Row(zero=1, model=PADDED_MOE, parallel=EP),
]
ON_TWO = shortened(ON_TWO)
MORE_ON_TWO = [
    Row(tp=2, zero=3),
    Row(tp=2, zero=1, dtype="bf16", prune="random"),
    Row(zero=3, dtype="bf16", prune="random", keys=PARTITION_EVERYTHING),
    *(Row(zero=zero) for zero in (0, 1, 3)),
    Row(tp=2),
    Row(tp=2, model=MOE, parallel=EP),
    Row(tp=2, sp=False, prune="random"),
    Row(pp=2, vpp=2, zero=1, model=MOE),
    Row(tp=2, zero=1, model=GPT2),
    Row(pp=2, model=QWEN3),
    Row(zero=2, dtype="bf16", prune="random"),
    *(Row(tp=2, zero=zero, model=MOE) for zero in (0, 3)),
    *(Row(tp=2, zero=zero, model=MOE, parallel=EP, prune="random") for zero in (1, 2)),
    Row(tp=2, zero=3, model={**PADDED_MOE, "full_rank_layers": [1]}, parallel=EP, keys=PARTITION_EVERYTHING),
    Row(zero=0, model=MOE, parallel=EP),
    *(Row(tp=2, zero=zero, model={**MOE, "full_rank_experts": True}, parallel=EP) for zero in (1, 3)),
    *(Row(zero=1, dtype="bf16", model=MOE_TO_ALL, parallel=parallel, prune="random") for parallel in ({}, EP)),
]
ON_FOUR = [
    Row(tp=2, pp=2, zero=1, model=MOE, parallel=EP),
    *(Row(zero=zero, model=MOE, parallel=EP) for zero in (0, 1)),
    Row(tp=2, zero=1, model=MOE, parallel=EP_4),
    Row(pp=2, vpp=2, zero=1, model=MOE, parallel=EP),
    Row(tp=2, zero=1, dtype="bf16", model=MOE_TO_ALL, parallel=EP_4, prune="random"),
]
MATRIX = [
    Row(tp=tp, pp=pp, zero=zero, dtype=dtype, prune="random" if dtype == "bf16" else "magnitude")
    for tp, pp, zero, dtype in itertools.product((1, 2), (1, 2), (0, 1, 2, 3), ("fp32", "bf16"))
    if (pp == 1 or zero <= 1) and (dtype == "fp32" or zero > 0)
]


@pytest.fixture(scope="module")
def two() -> list[Errors]:
    return run_distributed(measure, 2, ON_TWO, STEPS, timeout_s=900)[0]


@pytest.mark.parametrize("index", range(len(ON_TWO)), ids=[str(row) for row in ON_TWO])
def test_restarts_on_two_ranks(index: int, two: list[Errors]) -> None:
    check(ON_TWO[index].dtype, two[index], bf16=BF16)


@pytest.mark.long
@pytest.mark.parametrize(("world_size", "rows"), [(2, MORE_ON_TWO), (4, ON_FOUR + MATRIX)], ids=["two", "four"])
def test_more_restarts(world_size: int, rows: list[Row]) -> None:
    for row, errors in zip(rows, run_distributed(measure, world_size, rows, STEPS, timeout_s=1500)[0], strict=True):
        check(row.dtype, errors, bf16=BF16)


SWITCHES = [
    Row(tp=2, zero=3, dtype="bf16", keys=PARTITION_EVERYTHING),
    Row(zero=2, dtype="bf16"),
    Row(pp=2, zero=1, model=PADDED),
    Row(tp=2),
    Row(zero=1, dtype="bf16", model=MOE, parallel=EP),
]


def switch(rows: list[Row]) -> list[tuple[set[str], float, int]]:
    """Of each row: weights that the next phase has anew, errors of those that it takes over, Adam's count."""
    found = []
    for row in rows:
        config = row.config()
        relora = dataclasses.replace(config.relora, warm_start_steps=4)
        dense, low_rank = phases_of(dataclasses.replace(config, relora=relora))
        first = build_engine(dense.config)
        first.forward_backward(micro_batches(dense.config, first.context.dp_rank, first.context.world_size), 50)
        first.update()
        masters = first.states()
        first.close()
        first.zero.release()
        second = TrainEngine(low_rank.config, build_model_chunks(low_rank.config), first.context)
        second.start_from(masters)
        now = second.states()
        error = max(float((now[name][MASTER] - kinds[MASTER]).abs().max()) for name, kinds in masters.items())
        found.append((now.keys() - masters.keys(), error, second.zero.steps))
        close_engine(second)
    return found


def test_the_warm_start_hands_its_weights_on_in_every_layout() -> None:
    for of_rank in run_distributed(switch, 2, SWITCHES):
        for missing, error, steps in of_rank:
            assert missing
            assert all(name.endswith((".a.weight", ".b.weight")) for name in missing)
            assert (error, steps) == (0.0, 0)


def restarted(config: Config) -> tuple[dict[str, Any], ...]:
    """Masters and first moments before a restart, after it, and masters after the next step."""
    engine = build_engine(config)
    for step in range(3):
        engine.forward_backward(micro_batches(config, 0, 1, step), 50)
        engine.update()
    before = state_of(engine)
    restart(engine.zero, engine.chunks, config.relora, config.training.seed, 1)
    after = state_of(engine)
    weights = {w.name: w.local().clone() for w in local_weights(engine)}
    engine.forward_backward(micro_batches(config, 0, 1, 3), 50)
    engine.update()
    last = {name: kinds[MASTER] for name, kinds in engine.states().items()}
    close_engine(engine)
    return before, after, weights, last


def state_of(engine: TrainEngine) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for name, of_weight in engine.states(KINDS).items():
        for kind, values in of_weight.items():
            kinds.setdefault(kind, {})[name] = values
    return kinds


@pytest.mark.parametrize("model", [RELORA, pytest.param(MOE_TO_ALL, marks=pytest.mark.long)], ids=["llama", "moe"])
def test_a_restart_merges_what_bf16_would_lose_and_begins_anew(model: dict[str, Any]) -> None:
    """The traps of others' code: both factors zero, a merge in bf16, a reset that resets nothing."""
    config = Row(zero=1, dtype="bf16", model=model).config()
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, lr=1e-5, adam_eps=1e-8),
        relora=ReloraConfig(restart_interval=50, prune_share=0.8),
    )
    (before, after, weights, last) = run_distributed(restarted, 1, config)[0]
    lost = []
    for name in (n for n in before["master"] if n.endswith(".a.weight")):
        base = name.removesuffix(".a.weight")
        a, b, w = (before["master"][f"{base}.{part}weight"] for part in ("a.", "b.", ""))
        assert b.any(), "B has learned, so A was not zero"
        change = 0.25 * b @ a
        merged = after["master"][f"{base}.weight"]
        assert (merged - w - change).norm() < 1e-2 * change.norm()
        assert torch.equal(weights[f"{base}.weight"], merged.bfloat16())
        lost.append((w.bfloat16() + change.bfloat16() == w.bfloat16()).float().mean())
        assert not after["master"][f"{base}.b.weight"].any()
        assert not torch.equal(after["master"][name], a)
        assert last[f"{base}.b.weight"].any()
        for kind, part in itertools.product(MOMENTS, ("a", "b")):
            kept = after[kind][f"{base}.{part}.weight"].count_nonzero() / a.new_tensor(
                b.numel() if part == "b" else a.numel()
            )
            assert kept < 0.21
            assert kept > 0
    assert min(lost) > 0.9, "most of what is merged would be lost in bf16"
    untouched = [n for n in after["exp_avg"] if not n.endswith((".a.weight", ".b.weight"))]
    assert untouched
    assert all(torch.equal(after[kind][n], before[kind][n]) for n in untouched for kind in MOMENTS)


OVER_LAYOUTS = {
    "llama": [Row(tp=2, zero=3, keys=PARTITION_EVERYTHING), Row(zero=1), Row(pp=2, zero=1)],
    "qwen3_moe": [
        Row(zero=1, model=MOE, parallel=EP),
        Row(tp=2, model=MOE, parallel=EP),
        Row(pp=2, zero=1, model=MOE),
    ],
}


def one_more_step(rows: list[Row], folder: str) -> list[tuple[int, dict[str, Any]]]:
    """Restarts and masters after three steps in the first layout, after a fourth, with a restart, and after that in
    each layout from the files of the third."""
    found, start = [], Path()
    for index, row in enumerate((rows[0], *rows)):
        config = dataclasses.replace(row.config(), checkpoint=CheckpointConfig(dir=f"{folder}/{index}"))
        engine = build_engine(config)
        checkpointer, state = Checkpointer(config, engine), TrainingState()
        if index:
            state = checkpointer.load(start)
            engine.restore_schedule(state.step)
            engine.restarts = state.restarts
        for step in range(state.step, 4):
            batches = micro_batches(config, engine.context.dp_rank, engine.context.world_size, step)
            engine.forward_backward(batches, int(random_mask(config, step).sum()))
            engine.update()
            engine.restart_if_due()
            if step < 2:
                continue
            checkpointer.save(dataclasses.replace(state, step=step + 1, restarts=engine.restarts))
            written = checkpointer.wait()
            assert written is not None
            start = written if step == 2 else start
            weights = CheckpointWeights(written)
            found.append((engine.restarts, weights.read(weights.shapes)))
        close_engine(engine)
    return found


def over_layouts(folder: str) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    return {name: one_more_step(rows, f"{folder}/{name}") for name, rows in OVER_LAYOUTS.items()}


@pytest.fixture(scope="module")
def one_more(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    return run_distributed(over_layouts, 2, str(tmp_path_factory.mktemp("relora")))[0]


@pytest.mark.parametrize("name", OVER_LAYOUTS)
def test_restarts_go_on_to_the_bit_and_in_another_layout_to_rounding(
    name: str, one_more: dict[str, list[tuple[int, dict[str, Any]]]]
) -> None:
    (before, first), (_, whole), *others = one_more[name]
    assert before == 1
    (_, same), *rest = others
    assert not torch.equal(first[FROZEN[name]], whole[FROZEN[name]])
    assert all(torch.equal(value, whole[name]) for name, value in same.items())
    for restarts, masters in rest:
        assert restarts == 2
        assert masters.keys() == whole.keys()
        for name, value in masters.items():
            torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)
