"""The shipped script on two real SLURM nodes, with the real trainer: warned, killed, cancelled, complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import Corpus, lines_of, start
from tests.integration.processes import last_step
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import PRETRAIN, TWO_NODES, Job, submit

pytestmark = pytest.mark.slurm

STEPS = 160
ENDLESS = 100000


def options(corpus: Corpus, output: Path, steps: int = STEPS) -> list[str]:
    changes = {"training__train_steps": steps, "training__eval_steps": 0, "checkpoint__save_interval": 40}
    return [
        *corpus.options(output, **changes, checkpoint__keep_last=2),
        "--deepspeed.zero_optimization.stage=1",
        "--logging.sample_tokens=0",
    ]


def pretrain(cluster: Cluster, corpus: Corpus, output: Path, *sbatch: str, steps: int = STEPS) -> Job:
    """The script as it is shipped; the trainer's options that are shipped are those of the quickstart."""
    return submit(
        cluster,
        output / "job.out",
        PRETRAIN,
        [*TWO_NODES, *sbatch],
        options(corpus, output, steps),
        CONFIG="examples/quickstart.yaml",
        OUTPUT_DIR=output,
    )


def latest(output: Path) -> int:
    """The step of the newest checkpoint, 0 before the first."""
    path = output / "checkpoints" / "latest"
    return int(path.read_text().removeprefix("step_")) if path.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    output = tmp_path_factory.mktemp("uninterrupted")
    return pretrain(cluster, corpus, output).wait(), output


def test_two_nodes_train_together_and_follow_one_process(
    uninterrupted: tuple[Job, Path], corpus: Corpus, tmp_path: Path
) -> None:
    job, output = uninterrupted
    assert (job.state, job.exit_status) == ("COMPLETED", 0), job.printed
    assert "2 nodes x 1" in job.printed
    alone = start(["--config=examples/quickstart.yaml", *options(corpus, tmp_path / "alone")])
    assert alone.returncode == 0, alone.stderr
    for key in ("loss", "grad_norm"):
        assert lines_of(output, key) == pytest.approx(lines_of(tmp_path / "alone", key), rel=1e-4)


def test_a_complete_run_does_not_requeue(uninterrupted: tuple[Job, Path], cluster: Cluster, corpus: Corpus) -> None:
    _, output = uninterrupted
    job = pretrain(cluster, corpus, output).wait()
    assert (job.state, job.restarts) == ("COMPLETED", 0)
    assert "nothing to do" in job.printed
    assert set(lines_of(output, "loss")) == set(range(1, STEPS + 1))


def test_a_warned_and_then_a_killed_job_continues_bit_for_bit(
    uninterrupted: tuple[Job, Path], cluster: Cluster, corpus: Corpus, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    job = pretrain(cluster, corpus, output)
    job.wait_for(lambda: last_step(output) >= 10, "step 10")
    # what --signal=B:USR1@... does when time is nearly up
    cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    job.start_again(1)
    saved = latest(output)
    assert 10 <= saved < STEPS, job.printed
    assert "saved and stopped as asked" in job.printed

    job.wait_for(lambda: latest(output) > saved, "a checkpoint of the second start")
    cluster.kill_node("node1")
    job.wait_for(lambda: job.state == "PENDING" and job.restarts == 2, "requeue after the node's end")
    cluster.start_node("node1")
    wait_until(lambda: cluster.node_state("node1") == "idle", 120, "node1")
    job.start_again(2)
    assert job.wait().state == "COMPLETED", job.printed
    assert latest(output) == STEPS
    for key in ("loss", "grad_norm"):
        assert lines_of(output, key) == lines_of(uninterrupted[1], key)


def test_slurm_warns_by_itself_and_scancel_ends_the_job(cluster: Cluster, corpus: Corpus, tmp_path: Path) -> None:
    output = tmp_path / "run"
    job = pretrain(cluster, corpus, output, "--time=60", "--signal=B:USR1@180", steps=ENDLESS)
    job.wait_for(lambda: last_step(output) >= 10, "step 10")
    # two to three minutes are left when it trains, however long it took to start: SLURM looks twice a minute
    hours, minutes, _ = map(int, cluster.job(job.id)["RunTime"].split(":"))
    cluster.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={60 * hours + minutes + 3}")
    job.wait_for(lambda: job.state == "PENDING" and job.restarts == 1, "requeue")
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    job.start_again(1)
    assert "warning signal" in job.printed
    saved = latest(output)
    job.wait_for(lambda: last_step(output) >= saved + 10, "more steps")
    cluster.run("scancel", job.id)
    job.wait()
    assert (job.state, job.restarts) == ("CANCELLED", 1)
    assert "nothing is requeued here" in job.printed
