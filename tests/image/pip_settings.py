"""How this machine's pip finds packages, for a build that must leave none of it in the image."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

WHERE_PACKAGES_ARE = (
    "cert",
    "client-cert",
    "extra-index-url",
    "find-links",
    "index-url",
    "no-index",
    "proxy",
    "retries",
    "timeout",
    "trusted-host",
)


@dataclass(frozen=True)
class PipSettings:
    """A pip.conf for a build, and what of this machine it names.

    Attributes:
        text: the file; local folders stand in it under the paths at which they are mounted.
        mounts: path on this machine to path in the build.
    """

    text: str
    mounts: dict[Path, str]


def host_pip_settings() -> PipSettings:
    """What `pip config list` says about indexes, mirrors and certificates."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return build_settings(shown)


def build_settings(shown: str) -> PipSettings:
    """The same for a given output of `pip config list`, in which the environment's values come first, as they count."""
    found: dict[str, str] = {}
    mounts: dict[Path, str] = {}
    for line in shown.splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in WHERE_PACKAGES_ARE:
            found.setdefault(key, " ".join(_mounted(word, mounts) for word in ast.literal_eval(value).split()))
    return PipSettings("".join(["[global]\n", *(f"{key} = {value}\n" for key, value in found.items())]), mounts)


def _mounted(word: str, mounts: dict[Path, str]) -> str:
    """`word`, or where it will be mounted if it is a path of this machine; `mounts` grows by it."""
    scheme, path = ("file://", Path(word[7:])) if word.startswith("file://") else ("", Path(word))
    if not (path.is_absolute() and path.exists()):
        return word
    # the pages of a local index name their files as ../../files/...
    folder = path.parent if scheme and path.is_dir() else path
    target = mounts.setdefault(folder, f"/mnt/{len(mounts)}")
    return f"{scheme}{target}" if folder == path else f"{scheme}{target}/{path.name}"
