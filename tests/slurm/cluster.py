"""A SLURM cluster of some nodes on this host: its own ports, folder, key and daemons, and nothing of any other's."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.ports import free_ports

CONFIGURATION = """\
ClusterName=mini
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0,bf_interval=1
SlurmdTimeout=10
KillWait=30
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
TaskProlog={folder}/task_prolog
StateSaveLocation={folder}/spool
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
GresTypes=gpu
NodeName=node[0-{last}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{end}] CPUs=8 RealMemory=8000 \
Gres=gpu:1 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=120 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF State=UP
"""
# a character device that every host has stands for the GPU: SLURM only wants to see that it exists
DEVICES = "Name=gpu File=/dev/null Flags=nvidia_gpu_env\n"
PROLOG = """\
#!/bin/sh
# what a task of one node sees and the others do not: lines `export NAME=VALUE` in a file of the node's name
cat "{folder}/only_on_$SLURMD_NODENAME" 2>/dev/null || true
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster; `environment` makes SLURM's commands talk to it."""

    folder: Path
    nodes: int
    environment: dict[str, str]

    def run(self, *command: object, **variables: object) -> str:
        """Standard output of a command that must succeed, started from the folder `jobs`."""
        done = self.try_run(*command, **variables)
        assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def try_run(
        self, *command: object, cwd: Path | None = None, **variables: object
    ) -> subprocess.CompletedProcess[str]:
        """A command with more environment variables."""
        environment = {**self.environment, **{name: str(value) for name, value in variables.items()}}
        words = [str(word) for word in command]
        return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self._ask("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _ask(self, *command: str) -> str:
        for _ in range(10):  # it has been seen to fail without a word where the host is busy
            if (done := self.try_run(*command)).returncode == 0:
                return done.stdout.strip()
            time.sleep(0.5)
        return self.run(*command)

    @property
    def names(self) -> list[str]:
        """The nodes, the first one first."""
        return [f"node{number}" for number in range(self.nodes)]

    def start_node(self, name: str) -> None:
        """Start one node's daemon."""
        self.run("slurmd", "-N", name)

    def node_state(self, name: str) -> str:
        """As sinfo says it: idle, allocated, down* ..."""
        return self._ask("sinfo", "--noheader", "--partition=batch", f"--nodes={name}", "--format=%T")

    def kill_node(self, name: str) -> None:
        """End a node as a power cut does: its daemon and everything that runs on it."""
        running = self.processes(SLURMD_NODENAME=name)
        # slurmstepd, above them, has no variable with the name
        steps = {step for process in running for step in _steps_above(process)}
        _kill([psutil.Process(int((self.folder / f"{name}.pid").read_text())), *steps, *running])

    def processes(self, **environment: str) -> list[psutil.Process]:
        """Everything that was started for this cluster and has these environment variables."""
        wanted = {
            f"{name}={value}".encode() for name, value in {"SLURM_CONF": self.configuration, **environment}.items()
        }
        return [process for process in psutil.process_iter() if wanted <= _variables(process.pid)]

    @property
    def configuration(self) -> str:
        """Path of slurm.conf."""
        return self.environment["SLURM_CONF"]

    def log(self) -> str:
        """The last lines of the daemons' logs."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in logs)


def _variables(pid: int) -> set[bytes]:
    # not psutil's environ(), which stops at the gap that slurmstepd's title leaves
    with suppress(OSError):
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return set()


def _steps_above(process: psutil.Process) -> list[psutil.Process]:
    """SLURM's process that has started it; none where one of both has ended since it was listed."""
    with suppress(psutil.NoSuchProcess):
        parent = process.parent()
        return [parent] if parent and parent.name().startswith("slurmstepd") else []
    return []


@contextmanager
def running_cluster(nodes: int) -> Iterator[Cluster]:
    """A cluster whose daemons, jobs and files are gone afterwards, also when a test failed."""
    # munged wants a folder that everybody may enter, which those of pytest are not
    folder = Path(tempfile.mkdtemp(prefix="crnet-slurm-", dir="/tmp"))
    folder.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    path = os.pathsep.join([environment.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    cluster = Cluster(folder, nodes, {**environment, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")})
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        _configure(cluster)
        stack.callback(_stop, cluster)
        _start(cluster)
        yield cluster


def _configure(cluster: Cluster) -> None:
    folder, user = cluster.folder, pwd.getpwuid(os.geteuid()).pw_name
    first = free_ports(cluster.nodes + 1)
    text = CONFIGURATION.format(
        folder=folder, user=user, last=cluster.nodes - 1, control=first, first=first + 1, end=first + cluster.nodes
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(DEVICES)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "task_prolog").write_text(PROLOG.format(folder=folder))
    (folder / "task_prolog").chmod(0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    for name in cluster.names:
        (folder / "spool" / name).mkdir(parents=True)


def _start(cluster: Cluster) -> None:
    folder = cluster.folder
    files = {
        "key-file": "munge.key",
        "socket": "munge.sock",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "munge.seed",
    }
    cluster.run("munged", *(f"--{option}={folder / name}" for option, name in files.items()))
    cluster.run("slurmctld")
    for name in cluster.names:
        cluster.start_node(name)
    wait_until(lambda: {cluster.node_state(name) for name in cluster.names} == {"idle"}, 120, "the nodes")


def _stop(cluster: Cluster) -> None:
    """End the daemons, then whatever else was started for this cluster: jobs, and SLURM's processes above them."""
    daemons = []
    for path in cluster.folder.glob("*.pid"):
        with suppress(psutil.NoSuchProcess, ValueError):
            daemons.append(psutil.Process(int(path.read_text())))
    for process in daemons:
        process.terminate()
    psutil.wait_procs(daemons, timeout=60)
    _kill(daemons)
    _kill(cluster.processes())


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, f"cannot end {alive}"


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for a condition, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)
