"""Images and containers through podman, with a storage of its own that nothing else on the machine sees."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.image.pip_settings import PipSettings

ROOT = Path(__file__).parents[2]
BUILD_SECONDS, RUN_SECONDS = 1800, 300


class Podman:
    """podman with its storage in `folder`.

    Attributes:
        options: of `podman run`, without which it does not work on every machine.
        environment: of a process that shall see the same storage, for a script that calls podman itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "{_storage_driver(folder)}"\n'
            f'graphroot = "{folder / "storage"}"\nrunroot = "{folder / "run"}"\n'
        )
        (folder / "containers.conf").write_text(
            # a bridge would change the network of this machine
            '[containers]\nnetns = "none"\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\nruntime = "runc"\n'
            f'tmp_dir = "{folder / "tmp"}"\n'
        )
        pid_max = int(Path("/proc/sys/kernel/pid_max").read_text())
        self.options = (
            "--no-healthcheck",  # podman leaves the timing to systemd
            # the limits of this process, which a root without CAP_SYS_RESOURCE cannot raise to podman's own
            f"--ulimit=nofile={_limit(resource.RLIMIT_NOFILE)}",
            f"--ulimit=nproc={_limit(resource.RLIMIT_NPROC, pid_max)}",
        )
        self.environment = {
            **os.environ,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        }

    def __call__(
        self, *arguments: str | Path, check: bool = True, timeout: int = RUN_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run podman; with `check`, a status other than 0 shows what it printed."""
        command = ["podman", *map(str, arguments)]
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and result.returncode:
            shown = " ".join(command)
            raise AssertionError(
                f"{shown}: status {result.returncode}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
            )
        return result

    def run(
        self, image: str, *arguments: str, options: tuple[str, ...] = (), check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a container of `image`; `options` are podman's, `arguments` its command's."""
        return self("run", "--rm", *self.options, *options, image, *arguments, check=check)

    def python(self, image: str, code: str, *options: str) -> str:
        """What a piece of Python prints in a container of `image`."""
        return self.run(image, "-c", code, options=("--entrypoint=python3", *options)).stdout

    def has(self, image: str) -> bool:
        """Whether there is such an image."""
        return self("image", "exists", image, check=False).returncode == 0

    def image(self, name: str) -> dict[str, Any]:
        """`podman image inspect`."""
        return json.loads(self("image", "inspect", name).stdout)[0]

    def build(self, image: str, *options: str, file: Path = ROOT / "Dockerfile", pip: PipSettings) -> str:
        """Build from the repository; returns what was printed. Layers of the last build are used where they can be.

        How this machine finds packages comes in by a secret and by mounts, and so stays out of the image.
        """
        with TemporaryDirectory() as folder:
            secret = Path(folder) / "pip.conf"
            secret.write_text(pip.text)
            mounts = [f"--volume={source}:{target}:ro" for source, target in pip.mounts.items()]
            result = self(
                *("build", "--isolation", "chroot", "--layers", "--format", "docker"),
                *(f"--secret=id=pip.conf,src={secret}", *mounts, *options),
                *("--file", file, "--tag", image, ROOT),
                timeout=BUILD_SECONDS,
            )
        return result.stdout + result.stderr

    def clean(self) -> None:
        """Remove all containers, and the images of earlier builds; the newest stay, for the next build to reuse."""
        self("rm", "--all", "--force", "--time", "1", check=False)
        self("image", "prune", "--force", check=False)


def make_base_image(podman: Podman, image: str) -> None:
    """A minimal Debian with pip, from the mirror that this machine's apt uses.

    Raises:
        AssertionError: apt knows no mirror of the release that runs here, or a command failed.
    """
    release, mirror = _release_and_mirror()
    with TemporaryDirectory(dir=podman.folder) as folder:
        root, archive = Path(folder) / "root", Path(folder) / "root.tar"
        packages = "--include=ca-certificates,python3-pip"
        _run("debootstrap", "--variant=minbase", packages, release, root, mirror)
        for rest in ("var/cache/apt", "var/lib/apt/lists", "var/log", "etc/apt/sources.list", "etc/hostname"):
            path = root / rest
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (root / "etc" / "resolv.conf").unlink(missing_ok=True)  # debootstrap's copy of this machine's
        _run("tar", "--directory", root, "--create", "--file", archive, ".")
        podman("import", archive, image)


def _run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    shown = " ".join(map(str, command))
    assert result.returncode == 0, f"{shown}: status {result.returncode}\n{result.stdout[-4000:]}\n{result.stderr}"
    return result.stdout


def _release_and_mirror() -> tuple[str, str]:
    """Code name of this machine's release, and where apt gets its main packages from."""
    known = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    release = known.get("VERSION_CODENAME", "").strip('"')
    wanted = (release, "main")
    targets = _run("apt-get", "indextargets", "--format", "$(SITE)|$(CODENAME)|$(COMPONENT)").splitlines()
    mirrors = [site for site, name, component in (line.split("|") for line in targets) if (name, component) == wanted]
    assert mirrors, f"apt knows no mirror for main packages of {release}: add one to its sources and run apt-get update"
    return release, mirrors[0]


def _storage_driver(folder: Path) -> str:
    """overlay where the kernel can put one on this folder, and vfs, which copies every layer, elsewhere."""
    with TemporaryDirectory(dir=folder) as probe:
        lower, upper, work, merged = paths = [Path(probe) / name for name in ("lower", "upper", "work", "merged")]
        for path in paths:
            path.mkdir()
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        command = ["unshare", "--mount", "mount", "-t", "overlay", "overlay", "-o", options, str(merged)]
        return "vfs" if subprocess.run(command, capture_output=True, check=False).returncode else "overlay"


def _limit(what: int, largest: int | None = None) -> str:
    soft, hard = resource.getrlimit(what)
    values = [-1 if value == resource.RLIM_INFINITY else value for value in (soft, hard)]
    if largest is not None:
        values = [largest if value == -1 else min(value, largest) for value in values]
    return ":".join(map(str, values))
