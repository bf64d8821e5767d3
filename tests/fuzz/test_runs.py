"""Random whole runs by the trainer: stopped twice they end with the same bits, and go on in another layout.

`make test` runs some; `make fuzz FUZZ_SEED=2 FUZZ_CASES=400` others.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_crnet import Config, to_hf
from megatron_crnet.distributed.consensus import run_on_main
from megatron_crnet.training.callbacks.base import Callback, Step
from megatron_crnet.training.trainer import Trainer, TrainResult, run_training
from tests.distributed.spawn import fresh_world, run_distributed
from tests.fuzz.layouts import Section
from tests.fuzz.runs import Run, draw
from tests.integration.conftest import Corpus, checkpoint, saved

SEED = os.environ.get("FUZZ_SEED", "1")
CASES = int(os.environ.get("FUZZ_CASES", "0"))
"""Of each number of ranks; by default one alone."""
OF_MACHINES = ("step_time_s", "checkpoint_wait_s", "tokens_per_s", "peak_memory_bytes", "tflops_per_device")
COUNTED = ("lr", "samples", "tokens", "restarts")


class StopsAfter(Callback):
    """Has one rank ask for a stop after a step."""

    def __init__(self, step: int, asks: bool) -> None:
        self._step, self._asks, self._done = step, asks, 0

    def on_start(self, trainer: Trainer) -> None:
        self._done = trainer.state.step

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        self._done = trainer.state.step

    def wants_stop(self) -> bool:
        return self._asks and self._done + 1 >= self._step


def train(config: Config, *callbacks: Callback) -> TrainResult:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        result = run_training(config, callbacks=callbacks)
    fresh_world()
    return result


def metrics_of(output: Path) -> dict[int, dict[str, Any]]:
    """Every metric by step, but those that say how fast the machine was."""
    found: dict[int, dict[str, Any]] = {}
    for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()):
        values = {name: value for name, value in line.items() if not name.startswith((*OF_MACHINES, "step"))}
        found.setdefault(line["step"], {}).update(values)
    return {step: values for step, values in found.items() if values}


def differences(whole: Path, cut: Path, last: int) -> Iterator[str]:
    """What a run has otherwise than another, in metrics or in the state of its last step."""
    one, other = metrics_of(whole), metrics_of(cut)
    if str(one) != str(other):  # NaN is itself here
        yield f"resumed: metrics {other} instead of {one}"
    mine, theirs = saved(whole, last), saved(cut, last)
    others = [name for name in {*mine, *theirs} if not torch.equal(mine.get(name, EMPTY), theirs.get(name, EMPTY))]
    if others:
        yield f"resumed: other {sorted(others)[:5]}"


EMPTY = torch.empty(0)


def moved_differences(case: Run, whole: Path, moved: Path, after: int) -> Iterator[str]:
    """The same for a run in another layout after a step, to rounding."""
    one, other = metrics_of(whole), metrics_of(moved)
    bound = tolerance(case)
    for step, values in other.items():
        for name, value in values.items() if step > after else ():
            before = one.get(step, {}).get(name)
            is_loss = name.endswith("loss") or name == "rank_energy"
            limit = bound if is_loss else 1e-9 if name in COUNTED else None
            if limit is not None and (before is None or abs(value - before) > limit * abs(before)):
                yield f"moved: {name} of step {step} is {value} instead of {before}"


def tolerance(case: Run) -> float:
    """Relative, of losses: rounding, and what it makes of 8-bit codes and of the choice of experts."""
    model, is_8bit = case.sections["model"], case.sections["optimizer"].get("name") == "adamw8bit"
    is_exact = case.sections["training"]["dtype"] == "fp32" and not is_8bit
    return 3e-4 if is_exact and model.get("num_experts") == model.get("moe_router_topk") else 5e-2


def run(case: Run, folder: Path, files: Section) -> Iterator[str]:
    """What is wrong with a case; a collective call."""
    whole, cut, moved, last = (
        folder / "whole",
        folder / "cut",
        folder / "moved",
        case.sections["training"]["train_steps"],
    )
    changes: dict[str, Section] = {"data": files}
    if "distillation" in case.sections:
        train(case.dense().config(folder / "dense", data=files))
        changes["distillation"] = {"teacher": run_on_main(lambda: str(to_hf(folder / "dense", folder / "teacher")))}
    validated = train(case.config(whole, **changes)).validation_loss
    for step in case.stops:
        train(case.config(cut, **changes), StopsAfter(step, asks=dist.get_rank() == case.stopper))
    train(case.config(cut, **changes))
    yield from run_on_main(lambda: list(differences(whole, cut, last)))
    evaluates = {"training": {"eval_only": True}, "checkpoint": {"load": whole}}
    if validated is not None:
        again = train(case.elsewhere().config(folder / "evaluated", **changes, **evaluates)).validation_loss
        if again is None or abs(again - validated) > tolerance(case) * validated:
            yield f"evaluated elsewhere: {again} instead of {validated}"
    steps = [step for step in range(1, case.moved_at + 1) if checkpoint(whole, step).exists()]
    if steps and "hidden_dropout" not in case.sections["model"]:
        run_on_main(lambda: str(shutil.copytree(checkpoint(whole, steps[-1]), checkpoint(moved, steps[-1]))))
        train(case.elsewhere().config(moved, **changes))
        yield from run_on_main(lambda: list(moved_differences(case, whole, moved, steps[-1])))


def run_all(seeds: list[str], folder: str, files: Section) -> dict[str, list[str]]:
    found = {}
    for number, seed in enumerate(seeds):
        case = draw(seed, dist.get_world_size())
        try:
            found[f"{seed}: {case}"] = list(run(case, Path(folder, str(number)), files))
        except Exception as error:
            raise RuntimeError(f"{seed}: {case}") from error
    return {case: wrong for case, wrong in found.items() if wrong}


@pytest.mark.parametrize("ranks", [1, 2, 4] if CASES else [1])
def test_random_runs_are_stopped_moved_and_evaluated(ranks: int, corpus: Corpus, tmp_path: Path) -> None:
    files = {"train_data_path": [corpus.train], "valid_data_path": [corpus.valid], "tokenizer_model": corpus.tokenizer}
    seeds = [f"{SEED} {ranks} {number}" for number in range(CASES or 1)]
    given = str(tmp_path), {**files, "cache_path": tmp_path / "cache"}
    found = run_distributed(run_all, ranks, seeds, *given, timeout_s=600 + 120 * CASES)
    assert not {case: wrong for of_rank in found for case, wrong in of_rank.items()}
