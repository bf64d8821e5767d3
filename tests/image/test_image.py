"""The container image: what is in it, what is not, and that it trains."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.image.conftest import GPU, NVIDIA_STAND_IN, SOMEBODY, Runner, finish
from tests.image.pip_settings import PipSettings
from tests.image.podman import ROOT, RUN_SECONDS, Podman
from tests.integration.conftest import lines_of
from tests.integration.processes import wait_for_step
from tests.ports import free_ports

pytestmark = pytest.mark.image


def test_the_image_says_what_it_is_and_how_it_is_started(podman: Podman, cpu_image: str) -> None:
    config = podman.image(cpu_image)["Config"]
    assert config["User"] == "10001"
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert (labels["title"], labels["licenses"], labels["revision"]) == ("megatron_crnet", "Apache-2.0", "tested")
    assert labels["description"]
    # not by a shell, which would keep SIGTERM to itself
    assert config["Entrypoint"] == ["python3", "/opt/megatron_crnet/pretrain_crnet.py"]
    assert "usage:" in podman.run(cpu_image).stdout


def test_the_health_check_imports_what_a_run_needs(podman: Podman, cpu_image: str) -> None:
    kind, *command = podman.image(cpu_image)["Healthcheck"]["Test"]
    assert kind == "CMD"
    entrypoint = f"--entrypoint={command[0]}"
    printed = podman.run(cpu_image, *command[1:], options=(entrypoint,)).stdout
    assert [part.split()[0] for part in printed.split(", ")[:5]] == [
        *("torch", "megatron.core", "deepspeed", "megatron_crnet", "safetensors"),
    ]
    options = (entrypoint, "--env=DS_ACCELERATOR=absent")  # on which importing DeepSpeed fails
    broken = podman.run(cpu_image, *command[1:], options=options, check=False)
    assert broken.returncode == 1, broken.stdout


def test_nothing_of_the_build_or_of_this_machine_stays_in_the_image(
    podman: Podman, cpu_image: str, pip: PipSettings
) -> None:
    code = """
import os, pathlib
home = os.path.expanduser("~root")
for folder in (
    *(f"{home}/.cache", f"{home}/.config", "/home/crnet/.cache", "/var/lib/apt/lists", "/var/cache/apt"),
    *("/mnt", "/run/secrets", "/tmp"),
):
    for path in pathlib.Path(folder).rglob("*"):
        if not path.is_dir() and path.lstat().st_size: print(path)  # mount points stay, empty
for name in ("/etc/pip.conf", f"{home}/.pip", "/etc/apt/sources.list", "/opt/megatron_crnet/.git"):
    if os.path.lexists(name): print(name)
"""
    assert podman.python(cpu_image, code, "--user=0") == ""
    described = json.dumps(podman.image(cpu_image)) + podman("history", "--no-trunc", "--format=json", cpu_image).stdout
    for line in pip.text.splitlines()[1:]:
        key, _, value = line.partition(" = ")
        if not value.isdigit():  # a time limit tells nothing
            assert all(word not in described for word in value.split()), key
    assert not [path for path in pip.mounts if f"{path}:" in described]
    environment = podman.image(cpu_image)["Config"]["Env"]
    assert {entry.split("=")[0] for entry in environment} == {
        *("PATH", "HOME", "USER", "LOGNAME", "PYTHONUNBUFFERED", "PIP_CONSTRAINT"),
    }


def test_only_the_project_is_in_its_folder_and_pip_knows_it(podman: Podman, cpu_image: str) -> None:
    listed = podman.python(cpu_image, "import os; print(*sorted(os.listdir()))").split()
    ours = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert {name for name in listed if not name.endswith(".egg-info")} == {*ours, "constraints.txt", "data", "runs"}
    code = "from importlib.metadata import version; print(version('megatron_crnet'), version('megatron-core'))"
    assert podman.python(cpu_image, code).split() == ["0.1.0", "0.16.1"]


def test_changed_code_does_not_install_the_requirements_again(
    podman: Podman, base: str, cpu_image: str, pip: PipSettings
) -> None:
    """Another revision stands for the change: what comes before the code must be taken from the last build."""
    arguments = ["--target=cpu", f"--build-arg=CPU_BASE_IMAGE={base}", "--build-arg=REVISION=changed"]
    printed = podman.build("localhost/megatron_crnet:changed", *arguments, pip=pip)
    podman("rmi", "localhost/megatron_crnet:changed")
    assert "Successfully installed" not in printed
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert 0 < dockerfile.index("--requirement others.txt") < dockerfile.index("COPY . ./")


@pytest.fixture(scope="module")
def alone(runner: Runner) -> Path:
    """A run of one process."""
    printed = runner.run(*runner.train("alone"))
    assert "step 6/6" in printed
    return runner.folder / "runs" / "alone"


def test_a_run_writes_as_the_user_who_started_it(alone: Path) -> None:
    paths = [alone, *alone.rglob("*")]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in paths} == {(SOMEBODY, SOMEBODY)}
    losses = lines_of(alone, "loss")
    assert losses[6] < losses[1]


def test_two_processes_follow_one(runner: Runner, alone: Path) -> None:
    runner.run(*runner.train("two", deepspeed__zero_optimization__stage=2), PROCESSES=2)
    for key in ("loss", "grad_norm", "validation_loss"):
        expected = {step: value for step, value in lines_of(alone, key).items() if step <= 6}
        assert lines_of(runner.folder / "runs" / "two", key) == pytest.approx(expected, rel=1e-5)


def test_two_nodes_follow_one(runner: Runner, alone: Path) -> None:
    """Two containers on the host's network stand for two nodes."""
    nodes = {"NODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1), "PROCESSES": 1}
    arguments = runner.train("nodes")
    started = [runner.start("run_multinode.sh", *arguments, **nodes, NODE_RANK=rank) for rank in (0, 1)]
    for process in started:
        finish(process)
    expected = {step: value for step, value in lines_of(alone, "loss").items() if step <= 6}
    assert lines_of(runner.folder / "runs" / "nodes", "loss") == pytest.approx(expected, rel=1e-5)


def test_the_same_command_continues_in_a_new_container(runner: Runner, alone: Path) -> None:
    printed = runner.run(*runner.train("alone", training__train_steps=9))
    assert "continuing from" in printed
    assert set(lines_of(alone, "loss")) == set(range(1, 10))


def test_a_mistake_is_status_2_outside_the_container_as_well(runner: Runner) -> None:
    process = runner.start("run.sh", *runner.train("mistake", model__hidden_size=33))
    printed, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 2, printed
    assert "error: model.hidden_size 33" in printed
    assert not (runner.folder / "runs" / "mistake").exists()


def test_a_signal_reaches_the_trainer(runner: Runner) -> None:
    """Else the engine would kill it after STOP_TIMEOUT, status 137."""
    process = runner.start("run.sh", *runner.train("stopped", training__train_steps=100000))
    wait_for_step(runner.folder / "runs" / "stopped", 1, [process])
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 75, printed
    assert "stopped by SIGTERM after step" in printed
    assert runner.podman("ps", "--all", "--quiet").stdout == ""


def test_the_gpu_target_keeps_what_its_base_image_compiled_against(podman: Podman, base: str, pip: PipSettings) -> None:
    file = Path(__file__).parent / "nvidia_stand_in.Dockerfile"
    podman.build(NVIDIA_STAND_IN, f"--build-arg=BASE_IMAGE={base}", file=file, pip=pip)
    arguments = [f"--build-arg=BASE_IMAGE={NVIDIA_STAND_IN}", f"--build-arg=CPU_BASE_IMAGE={base}"]
    podman.build(GPU, *arguments, pip=pip)
    code = (
        "from importlib.metadata import version; print(*map(version, ('torch', 'numpy', 'PyYAML', 'megatron_crnet')))"
    )
    before = podman.python(NVIDIA_STAND_IN, code.replace(", 'megatron_crnet'", "")).split()
    after = podman.python(GPU, code).split()
    assert before[1:] == ["2.3.5", "6.0.2"]
    assert after == [*before[:2], "6.0.3", "0.1.0"]
    assert "torch 2." in podman.run(GPU, "tools/check_imports.py", options=("--entrypoint=python3",)).stdout
