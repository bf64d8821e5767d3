"""examples/docker/: the exact commands. That they run is tests/image."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "docker"
NODES = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}


def call(script: str, *arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], **variables}
    command = [str(FOLDER / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=30, check=False)


def shown(script: str, *arguments: str, folder: Path, **variables: str) -> list[str]:
    """The command's words, read back as a shell reads them."""
    result = call(script, "--dry-run", *arguments, folder=folder, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    assert not list(folder.iterdir())
    return shlex.split(result.stdout)


def common(folder: Path, *options: str) -> list[str]:
    return [
        *("docker", "run", "--rm", "--init", "--stop-timeout", "600", "--user", f"{os.getuid()}:{os.getgid()}"),
        *("--shm-size", "16g", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864"),
        *("--volume", f"{folder}/data:/opt/megatron_crnet/data"),
        *("--volume", f"{folder}/runs:/opt/megatron_crnet/runs"),
        *options,
        *("--entrypoint", "python3", "megatron_crnet"),
    ]


def test_one_process_is_the_trainer_itself(tmp_path: Path) -> None:
    command = shown("run.sh", "--config", "a b.yaml", folder=tmp_path)
    assert command == [*common(tmp_path, "--gpus", "all"), "pretrain_crnet.py", "--config", "a b.yaml"]


def test_several_processes_have_a_launcher(tmp_path: Path) -> None:
    variables = {"PROCESSES": "8", "GPUS": "none", "DOCKER_OPTIONS": "--env HF_TOKEN"}
    command = shown("run.sh", "--config", "x", folder=tmp_path, **variables)
    launcher = ["tools/launch.py", "--standalone", "--nproc_per_node=8"]
    expected = [*common(tmp_path, "--env", "HF_TOKEN"), *launcher, "pretrain_crnet.py", "--config", "x"]
    assert command == expected


@pytest.mark.fault("B6")
def test_what_chooses_the_network_is_handed_on(tmp_path: Path) -> None:
    settings = {"NCCL_IB_HCA": "mlx5", "GLOO_SOCKET_IFNAME": "ib0", "TORCH_GLOO_LAZY_INIT": "0", "UCX_TLS": "rc, tcp"}
    for script, variables in (("run.sh", {}), ("run_multinode.sh", NODES)):
        command = shown(script, folder=tmp_path, **variables, **settings)
        options = command[: command.index("megatron_crnet")]
        for name, value in settings.items():
            assert options[options.index(f"{name}={value}") - 1] == "--env"


def test_nodes_share_the_hosts_network_and_nccls_settings(tmp_path: Path) -> None:
    nccl = {"NCCL_SOCKET_IFNAME": "eth0,eth1", "NCCL_DEBUG": "INFO"}
    command = shown("run_multinode.sh", folder=tmp_path, **NODES, **nccl)
    network, image = command.index("--network"), command.index("megatron_crnet")
    assert command[network + 1] == "host"
    assert {"NCCL_SOCKET_IFNAME=eth0,eth1", "NCCL_DEBUG=INFO"} <= set(command[network:image])
    assert command[image + 1 :] == [
        *("tools/launch.py", "--nnodes=2", "--node_rank=1"),
        *("--master_addr=node0", "--master_port=29500", "--nproc_per_node=8", "pretrain_crnet.py"),
    ]


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("run.sh", {"PROCESSES": "two"}, "PROCESSES is two"),
        ("run_multinode.sh", {**NODES, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ("run_multinode.sh", {**NODES, "NODES": "many"}, "NODES is many"),
        ("run_multinode.sh", {**NODES, "NODE_RANK": "2"}, "NODE_RANK is 2"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    script: str, variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    result = call(script, folder=tmp_path, **variables)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
