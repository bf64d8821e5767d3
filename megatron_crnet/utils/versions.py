"""Installed versions, from package metadata: nothing is imported."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

LIBRARIES = ("torch", "triton", "megatron-core", "deepspeed", "apex", "transformer-engine", "megatron_crnet")
NOT_INSTALLED = "not installed"


@functools.cache
def version_line() -> str:
    """This project, Python and the libraries that training depends on, in one line."""
    libraries = [f"{name} {_version(name)}" for name in ("torch", "megatron-core", "deepspeed")]
    return ", ".join([f"megatron_crnet {own_version()}", *libraries, f"Python {platform.python_version()}"])


def own_version() -> str:
    """The version of the source tree that runs, which need not be the installed one."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return _version("megatron_crnet")


def library_versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Installed versions of the libraries that a result depends on."""
    return {library: _version(library) for library in libraries}


@functools.cache
def _packages() -> Mapping[str, list[str]]:
    """Packages by module; reads the file lists of all packages, some megabytes."""
    return importlib.metadata.packages_distributions()


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        # some builds of PyTorch bring Triton in a package of another name, such as pytorch-triton
        packages = sorted(set(_packages().get(library, ())))
        return ", ".join(importlib.metadata.version(package) for package in packages) or NOT_INSTALLED
