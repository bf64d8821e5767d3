"""Random layouts train like the plain reference; recomputed and resumed they give the same bits, moved the same run.

`make test` runs some; `make fuzz FUZZ_SEED=2 FUZZ_CASES=400` others.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_crnet.config.schema import CheckpointConfig
from tests.distributed import test_checkpoint, test_recompute
from tests.distributed.layouts import BF16_BOUNDS, FP32_BOUND
from tests.distributed.spawn import fresh_world, run_distributed
from tests.fuzz.layouts import Case, draw
from tests.helpers import compare_with_reference

SEED = os.environ.get("FUZZ_SEED", "1")
CASES = int(os.environ.get("FUZZ_CASES", "0"))
"""Of each number of ranks; by default one of the smaller ones."""
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
IN_PLAIN_FP32 = {"low_rank": 1e-4, "relora": 1e-4}
"""Plain PyTorch is that far off in fp32 as well: a product's gradient by small factors cancels, and after a restart B
is nothing but an update, which divides by the root of such squares."""
MOVED = {"fp32": 1e-4, "bf16": 3e-2}


def run(case: Case, folder: str) -> list[str]:
    """What is wrong with a case; a collective call."""
    config, model = case.config(steps=3), case.sections["model"]
    errors, dtype = compare_with_reference(config), config.training.dtype
    fresh_world()
    bound = IN_PLAIN_FP32.get(model["variant"], FP32_BOUND)
    wrong = errors.worst() >= bound if dtype == "fp32" else errors.loss >= BF16_BOUNDS.loss
    found = [f"differs from the reference: {errors}"] if wrong else []
    if "relora" in case.sections or "distillation" in case.sections:  # restarts and teachers are the trainer's
        return found
    if case.recompute["strategy"] != "none":
        plain = test_recompute.train(case.config({"strategy": "none"}, model=DROPOUT))
        same = torch.tensor(test_recompute.same_bits(test_recompute.train(case.config(model=DROPOUT)), plain))
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
        found += [] if same else ["recomputed to other bits"]
    step, saved = Path(folder, "step_00000002"), CheckpointConfig(dir=folder)
    whole, _ = test_checkpoint.train(dataclasses.replace(case.config(), checkpoint=saved), save_at=2)
    again, _ = test_checkpoint.train(dataclasses.replace(case.config(), checkpoint=saved), step)
    found += [] if again == whole[2:] else [f"resumed to {again} instead of {whole[2:]}"]
    moved, _ = test_checkpoint.train(dataclasses.replace(case.elsewhere(), checkpoint=saved), step)
    pairs = zip(moved, whole[2:], strict=True)
    off = max(abs(a / b - 1) for one, other in pairs for a, b in zip(one, other, strict=True))
    return found if off < MOVED[dtype] else [*found, f"in another layout {moved} instead of {whole[2:]}"]


def run_all(seeds: list[str], folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, seed in enumerate(seeds):
        case = draw(seed, dist.get_world_size())
        try:
            wrong = run(case, f"{folder}/{number}")
        except Exception as error:
            raise RuntimeError(f"{seed}: {case}") from error
        found |= {f"{seed}: {case}": wrong} if wrong else {}
        fresh_world()
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4, 6] if CASES else [1, 2])
def test_random_layouts_are_exact(ranks: int, tmp_path: Path) -> None:
    seeds = [f"{SEED} {ranks} {number}" for number in range(CASES or 1)]
    found = run_distributed(run_all, ranks, seeds, str(tmp_path), timeout_s=600 + 60 * CASES)
    assert not {case: wrong for of_rank in found for case, wrong in of_rank.items()}
