"""srun without a launcher of its own, a batch script and salloc's shell: who is a rank, and of how many."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, Corpus, lines_of
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Job, submit

pytestmark = [pytest.mark.slurm, pytest.mark.fault("L2")]

READ = "from megatron_crnet.distributed.launcher import read_launch; x = read_launch()"
SHOW = f"{READ}; print(x.rank, x.world_size, x.local_rank)"
SCRIPT = """#!/bin/bash
cd {root}
echo alone: $({python} -c "{show}; print(x.remark)")
srun --ntasks={tasks} {program}
"""


def run(cluster: Cluster, folder: Path, tasks: int, program: str) -> Job:
    script = folder / "job.sh"
    script.write_text(SCRIPT.format(root=ROOT, python=sys.executable, show=SHOW, tasks=tasks, program=program))
    return submit(cluster, folder / "job.out", str(script), ["--nodes=2", f"--ntasks={tasks}"], []).wait()


def test_the_batch_script_is_alone_and_tasks_of_srun_are_ranks(cluster: Cluster, tmp_path: Path) -> None:
    job = run(cluster, tmp_path, 4, f'{sys.executable} -c "{SHOW}"')
    first, *ranks = job.printed.splitlines()
    assert first.startswith(
        "alone: 0 1 None note: SLURM gave this job 4 tasks, but this is one process outside of srun"
    )
    assert sorted(line.split()[:2] for line in ranks) == [[str(rank), "4"] for rank in range(4)], job.printed
    assert sorted(line.split()[2] for line in ranks) in (["0", "0", "1", "1"], ["0", "0", "1", "2"])


def test_the_shell_of_salloc_is_alone(cluster: Cluster) -> None:
    shown = cluster.run("salloc", "--ntasks=2", sys.executable, "-c", f"{SHOW}; print(x.remark)", PYTHONPATH=ROOT)
    assert "0 1 None" in shown
    assert "note: SLURM gave this job 2 tasks" in shown


def test_srun_alone_trains_one_run_of_two_ranks(cluster: Cluster, corpus: Corpus, tmp_path: Path) -> None:
    options = corpus.options(tmp_path / "run", training__train_steps=2, training__eval_steps=0)
    command = [sys.executable, "pretrain_crnet.py", *options, "--logging.sample_tokens=0"]
    job = run(cluster, tmp_path, 2, " ".join(f"'{word}'" for word in command))
    assert job.state == "COMPLETED", job.printed
    assert set(lines_of(tmp_path / "run", "loss")) == {1, 2}
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*/shard-*.safetensors"))) == 2
