"""A cluster of two nodes for all tests here, and the shipped scripts submitted to it as a user does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.conftest import LIMIT_S, ROOT, corpus
from tests.slurm.cluster import Cluster, running_cluster

__all__ = ["corpus"]

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
# two nodes that are one host: their names have no addresses, and there is nothing but loopback between them
ONE_HOST = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
PRETRAIN = "examples/slurm/pretrain.sbatch"
TWO_NODES = ["--nodes=2", "--gpus-per-node=1"]


@dataclass(frozen=True)
class Job:
    """A submitted job and the file with what it prints."""

    cluster: Cluster
    id: str
    output: Path

    @property
    def state(self) -> str:
        return self.cluster.job(self.id)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.id)["Restarts"])

    @property
    def exit_status(self) -> int:
        """Of the batch script."""
        return int(self.cluster.job(self.id)["ExitCode"].split(":")[0])

    @property
    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait(self) -> Job:
        """Until it has ended for good."""
        self.wait_for(lambda: self.state in ENDED, "its end")
        return self

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Until `condition` holds; fails with the job's output when it ends before or the time is over."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            ended = self.state in ENDED and not condition()
            if ended or time.monotonic() > deadline:
                raise AssertionError(
                    f"no {what}: job {self.id} is {self.state}\n{self.printed[-4000:]}\n{self.cluster.log()}"
                )
            time.sleep(0.2)

    def start_again(self, restarts: int) -> None:
        """Wait until it is in the queue again, and do not wait the two minutes that SLURM then makes it wait."""
        self.wait_for(lambda: self.state == "PENDING" and self.restarts == restarts, f"requeue {restarts}")
        # a node refuses a start of the second in which it was told to end the job
        time.sleep(2)
        self.cluster.run("scontrol", "update", f"JobId={self.id}", "StartTime=now")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with running_cluster(nodes=2) as found:
        yield found


def submit(
    cluster: Cluster, output: Path, script: str, options: list[str], arguments: list[str], **variables: object
) -> Job:
    """Submit a shipped script, unchanged, from the repository's root."""
    output.parent.mkdir(parents=True, exist_ok=True)
    command = ["sbatch", "--parsable", f"--output={output}", *options, script, *arguments]
    done = cluster.try_run(*command, cwd=ROOT, **{**ONE_HOST, **variables})
    assert done.returncode == 0, done.stderr
    return Job(cluster, done.stdout.strip(), output)
