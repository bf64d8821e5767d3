"""What the shipped script does with each way in which agents end, on a real SLURM.

Here the agents are a few lines of shell, told how to end, because there are many ways and a trainer takes ten
seconds to start; test_pretrain.py has the real ones.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ONE_HOST, PRETRAIN, TWO_NODES, Job, submit

pytestmark = pytest.mark.slurm

# ENDS has a word for each start, in it an ending for each node: `75`, or `4:1`; SAVES makes a checkpoint before.
AGENT = """#!/usr/bin/env bash
starts=($ENDS)
IFS=: read -ra ends <<<"${starts[${SLURM_RESTART_COUNT:-0}]}"
end=${ends[SLURM_NODEID]:-${ends[0]}}
save() { [[ -z $SAVES || $SLURM_NODEID != 0 ]] || date +step_%s%N >"$CHECKPOINT_DIR/latest"; }
[[ $end != asked ]] || trap 'save; exit 75' TERM # before the line that a test waits for
echo "agent $SLURM_NODEID ends with $end: $*"
case $end in
dies) exec sleep 600 ;;
asked) sleep 600 & wait ;;
*) save; exit "$end" ;;
esac
"""


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    path = tmp_path / "agent"
    path.write_text(AGENT)
    path.chmod(0o755)
    return path


def run(cluster: Cluster, agent: Path, ends: str, *options: str, **variables: object) -> Job:
    settings = {"SAVES": "", **settings_of(agent, ends), **variables}
    return submit(cluster, agent.parent / "job.out", PRETRAIN, [*TWO_NODES, *options], [], **settings)


def settings_of(agent: Path, ends: str) -> dict[str, object]:
    output = agent.parent / "run"
    return {"PYTHON": agent, "ENDS": ends, "OUTPUT_DIR": output, "CHECKPOINT_DIR": output / "checkpoints"}


def test_the_nodes_are_in_slurms_order(cluster: Cluster, agent: Path) -> None:
    job = run(cluster, agent, "0", MASTER_ADDR="", OVERRIDES="--data.train_data_path '[a, b]'").wait()
    assert (job.state, job.exit_status) == ("COMPLETED", 0), job.printed
    for rank in range(2):
        launched = f"tools/launch.py --node_rank={rank} --nnodes=2 --nproc_per_node=1 "
        assert f"agent {rank} ends with 0: {launched}" in job.printed
    assert job.printed.count("--master_addr=node0 ") == 2
    assert job.printed.count("--data.train_data_path [a, b] --logging.output_dir=") == 2


@pytest.mark.parametrize(("ends", "status"), [("2", 2), ("3", 3), ("4:1", 1), ("1:4", 1), ("137:4", 137)])
def test_a_crash_is_not_requeued(ends: str, status: int, cluster: Cluster, agent: Path) -> None:
    job = run(cluster, agent, ends, SAVES=1).wait()
    assert (job.state, job.exit_status, job.restarts) == ("FAILED", status, 0), job.printed
    assert f"error: the trainer ended with status {status}: not requeued" in job.printed


def test_a_lost_peer_is_requeued_while_there_is_progress(cluster: Cluster, agent: Path) -> None:
    job = run(cluster, agent, "4 75 0", SAVES=1)
    job.start_again(1)
    job.start_again(2)
    assert job.wait().state == "COMPLETED", job.printed
    assert "a node or a process was lost" in job.printed


def test_without_progress_it_stops(cluster: Cluster, agent: Path) -> None:
    job = run(cluster, agent, "4 75 0")
    job.start_again(1)
    job.wait()
    assert (job.state, job.exit_status, job.restarts) == ("FAILED", 1, 1), job.printed
    assert "error: 2 starts from the checkpoint none made no new one: not requeued" in job.printed
    # a new submission is a new attempt
    again = run(cluster, agent, "0").wait()
    assert again.state == "COMPLETED", again.printed


def test_a_start_that_slurm_repeats_without_progress_stops_at_once(cluster: Cluster, agent: Path) -> None:
    """As after a node that dies each time, where the script never comes to its end."""
    job = run(cluster, agent, "dies dies 0")
    for restart in (1, 2):
        job.wait_for(lambda agents=2 * restart: job.printed.count("agent") == agents, f"start {restart}")
        cluster.run("scontrol", "requeue", job.id)
        job.start_again(restart)
    job.wait()
    assert (job.state, job.exit_status) == ("FAILED", 1), job.printed
    assert "error: 2 starts from the checkpoint none made no new one" in job.printed


def test_where_requeueing_is_not_wanted_the_status_says_so(cluster: Cluster, agent: Path) -> None:
    job = run(cluster, agent, "75", SAVES=1, REQUEUE=0).wait()
    assert (job.state, job.exit_status, job.restarts) == ("FAILED", 75, 0), job.printed


def test_a_warning_that_comes_before_the_trainer_can_save_requeues(cluster: Cluster, agent: Path) -> None:
    job = run(cluster, agent, "dies 0")
    job.wait_for(lambda: job.printed.count("ends with dies") == 2, "start")
    cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    job.start_again(1)
    assert job.wait().state == "COMPLETED", job.printed


def test_a_job_that_slurm_preempts_saves_and_comes_back(cluster: Cluster, agent: Path) -> None:
    job = run(cluster, agent, "asked 0", SAVES=1)
    job.wait_for(lambda: job.printed.count("agent") == 2, "start")
    urgent = ["--parsable", "--partition=urgent", "--nodes=2", "--exclusive", f"--output={agent.parent / 'urgent.out'}"]
    other = Job(cluster, cluster.run("sbatch", *urgent, "--wrap=true"), agent.parent / "urgent.out")
    job.start_again(1)
    assert other.wait().state == "COMPLETED"
    assert job.wait().state == "COMPLETED", job.printed
    assert "saved and stopped as asked" in job.printed


def test_other_code_on_one_node_is_named(cluster: Cluster, agent: Path) -> None:
    copy = agent.parent / "copy"
    for name in ("megatron_crnet", "tools", "examples"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pretrain_crnet.py", copy)
    seen = cluster.folder / "only_on_node1"
    seen.write_text(f"export REPO={copy}\n")
    try:
        job = run(cluster, agent, "0").wait()
        assert job.state == "COMPLETED", job.printed  # the same files in another folder
        with (copy / (changed := "megatron_crnet/model/norm.py")).open("a") as file:
            file.write("\n")
        job = run(cluster, agent, "0").wait()
        assert (job.state, job.exit_status) == ("FAILED", 2)
        assert f"error: node node1 has another {changed} than the others (1 files in all)" in job.printed
        shutil.rmtree(copy)
        job = run(cluster, agent, "0").wait()
        assert (job.state, job.exit_status) == ("FAILED", 2)
        assert "error: node node1 has no " in job.printed
    finally:
        seen.unlink()


def chain(cluster: Cluster, agent: Path, ends: str) -> list[Job]:
    command = ["examples/slurm/chain.sh", "3", *TWO_NODES, f"--output={agent.parent}/%j.out", PRETRAIN]
    done = cluster.try_run(*command, cwd=ROOT, **{**ONE_HOST, **settings_of(agent, ends), "SAVES": 1})
    assert done.returncode == 0, done.stderr
    return [Job(cluster, job, agent.parent / f"{job}.out") for job in done.stdout.split()]


def test_a_chain_goes_on_after_a_save_and_ends_after_a_crash(cluster: Cluster, agent: Path) -> None:
    saved = [job.wait() for job in chain(cluster, agent, "75")]
    assert [(job.state, job.restarts) for job in saved] == [("COMPLETED", 0)] * 3, saved[0].printed
    assert all("the next job of the chain continues" in job.printed for job in saved)
    crashed = [job.wait() for job in chain(cluster, agent, "1")]
    assert [job.state for job in crashed] == ["FAILED", "CANCELLED", "CANCELLED"]
