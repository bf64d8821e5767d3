"""The launchers that people use, each with two real processes: one run of two ranks, never two runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import LIMIT_S, ROOT, Corpus, lines_of
from tests.ports import free_ports

OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI", "MPI_", "TORCHELASTIC")
REPORT = "from megatron_crnet.distributed.launcher import read_launch; print(read_launch())"
SHOW = f"import sys; from megatron_crnet.distributed import launcher; launcher.take_local_rank(sys.argv[1:]); {REPORT}"


def start(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher in an environment that no other one has touched."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS)}
    environment |= {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def mpirun(name: str) -> list[str]:
    """The command line of one implementation's mpirun for two processes."""
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed")
    return [program, *(["--oversubscribe"] if "openmpi" in name else []), "-n", "2"]


def of_torch(option: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={free_ports(1)}"]
    return [*command, *([option] if option else [])]


def of_deepspeed() -> list[str]:
    program = Path(sys.executable).with_name("deepspeed")
    # by which DeepSpeed counts the devices of this node, where there is no GPU
    return [str(program), "--num_gpus=2", f"--master_port={free_ports(1)}"]


@pytest.mark.fault("L2")
@pytest.mark.parametrize("name", ["mpirun.openmpi", "mpirun.mpich"])
def test_mpirun_says_which_rank_each_process_is(name: str) -> None:
    result = start([*mpirun(name), sys.executable, "-c", REPORT])
    assert result.returncode == 0, result.stderr
    printed = sorted(result.stdout.splitlines())
    assert [line.partition(", address")[0] for line in printed] == [
        f"Launch(rank={rank}, world_size=2, local_rank={rank}" for rank in range(2)
    ]


TRAINING = [
    pytest.param(lambda: [*mpirun("mpirun.openmpi"), sys.executable], marks=pytest.mark.long, id="openmpi"),
    pytest.param(lambda: [*mpirun("mpirun.mpich"), sys.executable], marks=pytest.mark.long, id="mpich"),
    pytest.param(of_deepspeed, id="deepspeed"),
    pytest.param(lambda: of_torch(""), id="torch.distributed.launch"),
    pytest.param(lambda: of_torch("--use_env"), marks=pytest.mark.long, id="torch.distributed.launch --use_env"),
]


@pytest.mark.fault("L2", "M4")
@pytest.mark.parametrize("command", TRAINING)
def test_two_processes_are_two_ranks_of_one_run(command: object, corpus: Corpus, tmp_path: Path) -> None:
    assert callable(command)
    options = corpus.options(tmp_path / "run", training__train_steps=2, training__eval_steps=0)
    result = start([*command(), "pretrain_crnet.py", *options, "--logging.sample_tokens=0"])
    assert result.returncode == 0, result.stderr[-3000:]
    assert set(lines_of(tmp_path / "run", "loss")) == {1, 2}
    assert result.stdout.count("done: ") == 1
    # each of the two ranks owns a part
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*/shard-*.safetensors"))) == 2


@pytest.mark.fault("L2", "M3")
def test_processes_that_cannot_meet_are_refused_in_one_line_each(corpus: Corpus, tmp_path: Path) -> None:
    """As mpirun over several nodes, where nothing says how rank 0 is reached."""
    ranks = [{"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2"} for rank in range(2)]
    for variables in ranks:
        result = start([sys.executable, "pretrain_crnet.py", *corpus.options(tmp_path / "run")], **variables)
        assert result.returncode == 2
        assert result.stderr.startswith("error: OMPI_COMM_WORLD_RANK is set, but MASTER_ADDR is not")
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
