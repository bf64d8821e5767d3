"""The images, built once for all tests, and runs in them as examples/docker/ starts them."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.image.pip_settings import PipSettings, host_pip_settings
from tests.image.podman import ROOT, RUN_SECONDS, Podman, make_base_image
from tests.integration.conftest import TINY

# the number changes with the recipe of make_base_image
BASE = "localhost/megatron_crnet_base:1"
NVIDIA_STAND_IN = "localhost/megatron_crnet_nvidia_stand_in"
CPU, GPU = "localhost/megatron_crnet:cpu", "localhost/megatron_crnet:gpu"
# nobody whom the image or this machine knows
SOMEBODY = 4242


@dataclass(frozen=True)
class Runner:
    """Runs examples/docker/ with podman for docker, as somebody whom the image does not know.

    Attributes:
        folder: holds data/ and runs/, which are mounted.
    """

    podman: Podman
    folder: Path

    def environment(self, **variables: object) -> dict[str, str]:
        """What the scripts read."""
        defaults = {
            "IMAGE": CPU,
            "DOCKER": "podman",
            "GPUS": "none",
            "DATA": self.folder / "data",
            "OUTPUT": self.folder / "runs",
            "RUN_AS": f"{SOMEBODY}:{SOMEBODY}",
            "SHM_SIZE": "256m",
            "MEMLOCK": 8 << 20,  # what any root may ask for
            "OMP_NUM_THREADS": 1,
            "DOCKER_OPTIONS": " ".join((*self.podman.options, "--env=OMP_NUM_THREADS")),
        }
        return {**self.podman.environment, **{name: str(value) for name, value in {**defaults, **variables}.items()}}

    def start(self, script: str, *arguments: str, **variables: object) -> subprocess.Popen[str]:
        """Start a script of examples/docker/."""
        command = [str(ROOT / "examples" / "docker" / script), *arguments]
        return subprocess.Popen(
            command, env=self.environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments: str, **variables: object) -> str:
        """Run run.sh and return what it printed."""
        return finish(self.start("run.sh", *arguments, **variables))

    def train(self, output: str, **changes: object) -> list[str]:
        """Arguments of a training that takes seconds; `changes` use __ for the dot."""
        values: dict[str, object] = {
            **TINY,
            "data.train_data_path": "[data/train]",
            "data.valid_data_path": "[data/valid]",
            "data.tokenizer_model": "data/tokenizer.model",
            "logging.output_dir": f"runs/{output}",
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return [f"--{key}={value}" for key, value in values.items()]


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a script that shall succeed, and return what it printed."""
    printed, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """podman with a storage under the user's cache folder, which keeps base images and the layers of requirements."""
    if shutil.which("podman") is None:
        pytest.fail("podman is not installed: run `make test-image`, which installs it", pytrace=False)
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_crnet" / "test-image"
    podman = Podman(folder)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run would build under the same names
        yield podman
        podman.clean()


@pytest.fixture(scope="session")
def pip() -> PipSettings:
    """How this machine's pip finds packages."""
    return host_pip_settings()


@pytest.fixture(scope="session")
def base(podman: Podman) -> str:
    """A minimal Debian with pip."""
    if not podman.has(BASE):
        make_base_image(podman, BASE)
    return BASE


@pytest.fixture(scope="session")
def cpu_image(podman: Podman, base: str, pip: PipSettings) -> str:
    """The target `cpu` on the locally made base image."""
    podman.build(CPU, "--target=cpu", f"--build-arg=CPU_BASE_IMAGE={base}", "--build-arg=REVISION=tested", pip=pip)
    return CPU


@pytest.fixture(scope="session")
def runner(podman: Podman, cpu_image: str, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A folder with data that the image's own tools made of text that Python ships."""
    folder = tmp_path_factory.mktemp("host")
    for name in ("data", "runs"):
        (folder / name).mkdir()
        os.chown(folder / name, SOMEBODY, SOMEBODY)
    for parent in (folder, *folder.parents[:2]):  # pytest's own folders are for root alone
        parent.chmod(0o755)
    runner = Runner(podman, folder)
    text = Path(podman.python(CPU, "import json; print(json.__file__)")).parents[1]
    vocabulary = ["--vocab-size=512", "--output=data/tokenizer"]
    runner.run(str(text / "json"), *vocabulary, PROGRAM="tools/train_tokenizer.py")
    for name, source in (("train", "json"), ("valid", "logging")):
        target = [f"--output=data/{name}", "--tokenizer-model=data/tokenizer.model"]
        runner.run(str(text / source), *target, PROGRAM="tools/preprocess_data.py")
    return runner
