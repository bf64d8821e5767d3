"""The commands that examples/slurm/pretrain.sbatch would run, for each kind of container. The rest is tests/slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    settings = {"DRY_RUN": "1", "OUTPUT_DIR": "/runs/a", **settings}
    command = ["bash", "examples/slurm/pretrain.sbatch", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**environment, **settings}, capture_output=True, text=True, timeout=60, check=False
    )


def commands(*arguments: str, **settings: str) -> tuple[list[str], list[str]]:
    """The words of the two srun commands: checksums, training."""
    done = script(*arguments, **settings)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    words = [subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True) for line in lines]
    first, second = ([*found.stdout.split("\0")][:-1] for found in words)
    return first, second


def contains(words: list[str], wanted: list[str]) -> bool:
    return any(words[at : at + len(wanted)] == wanted for at in range(len(words)))


def test_options_reach_the_trainer_as_they_were_quoted() -> None:
    _, train = commands(
        "--logging.sample_prompt",
        "two words",
        CONFIG="examples/llama2_7b.yaml examples/layouts/llama2_7b_8gpu.yaml",
        OVERRIDES="--data.train_data_path '[a, b]' --optimizer.lr 1e-3",
    )
    at = train.index("pretrain_crnet.py")
    assert train[at + 1 :] == [
        "--config=examples/llama2_7b.yaml",
        "--config=examples/layouts/llama2_7b_8gpu.yaml",
        "--data.train_data_path",
        "[a, b]",
        "--optimizer.lr",
        "1e-3",
        "--logging.sample_prompt",
        "two words",
        "--logging.output_dir=/runs/a",
        "--checkpoint.dir=/runs/a/checkpoints",
    ]


def test_one_agent_a_node_with_a_static_master() -> None:
    check, train = commands(SLURM_NNODES="4", GPUS_PER_NODE="8", MASTER_ADDR="host7", SLURM_JOB_ID="20003")
    for words in (check, train):
        assert words[:4] == ["srun", "--nodes=4", "--ntasks=4", "--ntasks-per-node=1"]
    assert contains(train, ["--nnodes=4", "--nproc_per_node=8", "--master_addr=host7", "--master_port=10003"])
    assert '--node_rank="$SLURM_NODEID"' in train[train.index("agent") - 1]


def test_pyxis_is_told_by_options_of_srun() -> None:
    for words in commands(CONTAINER="pyxis", IMAGE="/images/a.sqsh", MOUNTS="/data,/scratch/me:/scratch"):
        assert "--container-image=/images/a.sqsh" in words
        same = ",".join(f"{path}:{path}" for path in (ROOT, "/runs/a", "/runs/a/checkpoints", "/data"))
        assert f"--container-mounts={same},/scratch/me:/scratch" in words
        assert words.index("--container-image=/images/a.sqsh") < words.index("bash")


def test_apptainer_and_docker_start_inside_of_the_step() -> None:
    for words in commands(CONTAINER="apptainer", IMAGE="a.sif", MOUNTS="/data", CONTAINER_ARGS="--cleanenv --contain"):
        assert contains(words, ["guard", "apptainer", "exec", "--nv", "--pwd", str(ROOT)])
        assert contains(words, ["--bind", "/data:/data", "--cleanenv", "--contain", "a.sif", "bash", "-c"])
    for words in commands(CONTAINER="docker", IMAGE="host/a:1", MOUNTS="/data", NCCL_IB_HCA="mlx5"):
        assert contains(words, ["docker", "--rm", "--gpus", "all", "--network", "host", "--ipc", "host"])
        assert contains(words, ["--volume", "/data:/data"])
        assert contains(words, ["--env", "NCCL_IB_HCA"])
        assert contains(words, ["host/a:1", "bash", "-c"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"CONTAINER": "podman", "IMAGE": "a"}, "CONTAINER is podman, but must be none, pyxis, apptainer or docker"),
        ({"CONTAINER": "docker"}, "CONTAINER is docker, but IMAGE is empty"),
        ({"CONFIG": "examples/none.yaml"}, "CONFIG names examples/none.yaml, which is not there"),
        ({"REPO": "/tmp"}, "holds no pretrain_crnet.py"),
        ({"OVERRIDES": "--a 'b"}, "OVERRIDES has an open quote"),
        ({"DRY_RUN": "0"}, "this is no SLURM job"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(settings: dict[str, str], message: str) -> None:
    done = script(**settings)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
