"""Odd inputs end in one line and a documented status: nothing is left behind, nothing hangs, no code of a file is run.

`make test` runs some forty; `make fuzz FUZZ_SEED=2 FUZZ_CASES=400` (of each kind) others. Figures: docs/results.md.
"""

from __future__ import annotations

import collections
import os
import shutil
from pathlib import Path

import pytest

from tests.fuzz.arena import build
from tests.fuzz.cases import KINDS, cases
from tests.fuzz.runner import fault, run_case

SEED = int(os.environ.get("FUZZ_SEED", "1"))
COUNTS = {"configurations": 12, "command lines": 8}
"""Of each kind in `make test`; 4 of the others."""


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "sound"
    build(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_odd_inputs_end_in_one_line(kind: str, arena: Path, tmp_path: Path) -> None:
    count = int(os.environ.get("FUZZ_CASES", "0")) or COUNTS.get(kind, 4)
    statuses: collections.Counter[int | None] = collections.Counter()
    faults, seconds = [], 0.0
    for number, case in enumerate(cases(kind, SEED, count)):
        folder = tmp_path / f"case_{number}"
        shutil.copytree(arena, folder, symlinks=True)
        found = run_case(case, folder)
        statuses[found.status], seconds = statuses[found.status] + 1, seconds + found.seconds
        wrong = fault(case, found)
        if wrong is None:
            shutil.rmtree(folder)
        else:
            faults.append(
                f"{number} ({case.name}; {case.program} {' '.join(case.argv)}): {wrong}\n{found.errors[-2000:]}"
            )
    print(
        f"{kind}: seed {SEED}, {count} cases in {seconds:.0f} s, by exit status {dict(statuses)}, {len(faults)} faults"
    )
    assert not faults, "\n\n".join(faults)
