"""Kills the ranks of runs at random moments and starts them again, until all steps are done.

Everything is drawn from a seed: the moment (while ranks start, or while they train and save), and who is killed (one
rank, or both, as when a node dies). A run that was killed must end with the metrics and tensors of one that was not.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_crnet.checkpoint.directory import PARTIAL, checkpoints, saved_step
from tests.forked import Program
from tests.integration.conftest import LIMIT_S, Corpus, lines_of
from tests.integration.processes import last_step, start_rank
from tests.ports import free_ports

KEYS = ("loss", "grad_norm", "lr", "tokens", "validation_loss")
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"deepspeed__zero_optimization__stage": 1, "training__dtype": "bf16"},
    {"deepspeed__zero_optimization__stage": 3, "model__hidden_dropout": 0.1},
    {"parallel__tensor_model_parallel_size": 2, "recompute__strategy": "replay"},
    {"parallel__pipeline_model_parallel_size": 2, "deepspeed__zero_optimization__stage": 1},
)
START_UP_S = 2.0
TRAINING_S = 1.5
SURVIVOR_S = 90.0
"""A rank that is left alone must have ended by itself after this."""


@dataclass(frozen=True)
class Kill:
    """One of them.

    Attributes:
        moment: `start-up`, `step` or `save` (a partial checkpoint lay in the folder).
        victims: ranks that got SIGKILL.
        reached: last step that was reported; `saved`: of the newest checkpoint, both 0 before the first.
        statuses: exit statuses of the ranks that were not killed.
    """

    moment: str
    victims: tuple[int, ...]
    reached: int
    saved: int
    statuses: tuple[int, ...]


@dataclass
class Outcome:
    """A killed run beside one that nobody disturbed."""

    layout: dict[str, Any]
    whole: Path
    killed: Path
    kills: list[Kill] = field(default_factory=list)

    def differences(self) -> list[str]:
        """What of the killed run is not as it should be."""
        found = [key for key in KEYS if lines_of(self.whole, key) != lines_of(self.killed, key)]
        whole, killed = (saved_tensors(checkpoints(run / "checkpoints")[-1]) for run in (self.whole, self.killed))
        if whole.keys() != killed.keys():
            found.append("names of the last checkpoint's tensors")
        found += [name for name in whole.keys() & killed.keys() if not torch.equal(whole[name], killed[name])]
        if any((self.killed / "checkpoints").glob(".*")):
            found.append("partial checkpoints are left")
        found += [f"a survivor ended with {s}" for kill in self.kills for s in kill.statuses if s != 4]
        return [f"{self.layout}: {difference}" for difference in found]


def saved_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Weights, moments and random states, by file and name."""
    found = {}
    for path in checkpoint.glob("*.safetensors"):
        found.update({f"{path.name} {name}": tensor for name, tensor in load_file(path).items()})
    return found


class Kills:
    """Runs one layout after the other until `kills` kills are done.

    Args:
        steps: of each run.
    """

    def __init__(self, corpus: Corpus, folder: Path, *, seed: int, kills: int, steps: int = 40) -> None:
        self.corpus, self.folder, self.wanted, self.steps = corpus, folder, kills, steps
        self.random = random.Random(seed)
        self.outcomes: list[Outcome] = []

    @property
    def kills(self) -> list[Kill]:
        """All of them."""
        return [kill for outcome in self.outcomes for kill in outcome.kills]

    def run(self) -> Kills:
        """Do it."""
        while len(self.kills) < self.wanted:
            number = len(self.outcomes)
            layout = LAYOUTS[number % len(LAYOUTS)]
            outcome = Outcome(layout, self.folder / f"whole{number}", self.folder / f"killed{number}")
            self.outcomes.append(outcome)
            self._undisturbed(layout, outcome.whole)
            limit = self.wanted - len(self.kills)
            while len(outcome.kills) < limit and self._newest(outcome.killed) < self.steps:
                kill = self._life(layout, outcome.killed)
                if kill is not None:
                    outcome.kills.append(kill)
            self._undisturbed(layout, outcome.killed)
        return self

    def _start(self, layout: dict[str, Any], output: Path) -> list[Program]:
        options = self.corpus.options(
            output,
            **layout,
            training__train_steps=self.steps,
            training__eval_interval=7,
            checkpoint__save_interval=1,
            checkpoint__keep_last=2,
            logging__log_interval=1,
        )
        port = free_ports(1)
        return [start_rank(rank, port, options) for rank in range(2)]

    def _undisturbed(self, layout: dict[str, Any], output: Path) -> None:
        ranks = self._start(layout, output)
        printed = [process.communicate(timeout=LIMIT_S)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], printed

    def _life(self, layout: dict[str, Any], output: Path) -> Kill | None:
        """Start the run and kill it; None if it was done before."""
        before, ranks = self._newest(output), self._start(layout, output)
        try:
            starting = self.random.random() < 0.2
            delay = self.random.uniform(0, START_UP_S if starting else TRAINING_S)
            if not starting:
                self._wait_for_progress(output, before, ranks)
            time.sleep(delay)
            # who starts waits for the others' arrival up to the time limit, which tests of its own look at
            victims = (0, 1) if starting or self.random.random() < 0.3 else (self.random.randrange(2),)
            if all(process.poll() is not None for process in ranks):
                return None
            for rank in victims:
                ranks[rank].send_signal(signal.SIGKILL)
            saving = any((output / "checkpoints").glob(f"{PARTIAL}*"))
            statuses = [ranks[rank].wait(timeout=SURVIVOR_S) for rank in range(2) if rank not in victims]
        finally:
            for process in ranks:
                process.kill()
                process.communicate()
        moment = "start-up" if self._newest(output) == before and starting else "save" if saving else "step"
        if 0 in statuses:
            return None  # it was just done
        return Kill(moment, victims, last_step(output), self._newest(output), tuple(statuses))

    def _wait_for_progress(self, output: Path, before: int, ranks: list[Program]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while self._newest(output) <= before and all(process.poll() is None for process in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _newest(self, output: Path) -> int:
        found = checkpoints(output / "checkpoints")
        return saved_step(found[-1]) if found else 0

    def differences(self) -> list[str]:
        """Of all runs."""
        return [difference for outcome in self.outcomes for difference in outcome.differences()]

    def figures(self) -> dict[str, Any]:
        """What to record."""
        lost = [kill.reached - kill.saved for kill in self.kills]
        return {
            "runs": len(self.outcomes),
            "kills": len(self.kills),
            "moments": dict(Counter(kill.moment for kill in self.kills)),
            "victims": dict(Counter("both" if len(kill.victims) == 2 else "one" for kill in self.kills)),
            "steps done again": {"mean": sum(lost) / max(len(lost), 1), "most": max(lost, default=0)},
            "runs that differ": self.differences(),
        }
