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
REPORT = """
import sys
from megatron_crnet.distributed import launcher
launcher.take_local_rank(sys.argv[1:])
print(f"{launcher.read_launch()}\\n", end="")  # in one piece, beside another rank's
"""


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


LAUNCHERS = {
    "openmpi": lambda: [*mpirun("mpirun.openmpi"), sys.executable],
    "mpich": lambda: [*mpirun("mpirun.mpich"), sys.executable],
    "deepspeed": of_deepspeed,
    "torch.distributed.launch": lambda: of_torch(""),
    "torch.distributed.launch --use_env": lambda: of_torch("--use_env"),
}


@pytest.mark.fault("L2", "M4")
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_says_which_rank_each_process_is(name: str, tmp_path: Path) -> None:
    (tmp_path / "report.py").write_text(REPORT)
    result = start([*LAUNCHERS[name](), str(tmp_path / "report.py")], PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    printed = sorted(line for line in result.stdout.splitlines() if line.startswith("Launch("))
    assert [line.partition(", address")[0] for line in printed] == [
        f"Launch(rank={rank}, world_size=2, local_rank={rank}" for rank in range(2)
    ]


@pytest.mark.long
@pytest.mark.fault("L2", "M4")
@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_processes_are_two_ranks_of_one_run(name: str, corpus: Corpus, tmp_path: Path) -> None:
    options = corpus.options(tmp_path / "run", training__train_steps=2, training__eval_steps=0)
    result = start([*LAUNCHERS[name](), "pretrain_crnet.py", *options, "--logging.sample_tokens=0"])
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
