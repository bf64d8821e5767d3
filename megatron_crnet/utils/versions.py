"""Installed versions, asked of the package metadata: nothing is imported."""

from __future__ import annotations

import importlib.metadata
import platform
import tomllib
from pathlib import Path


def version_line() -> str:
    """This project, Python and the libraries that training depends on, in one line."""
    libraries = [f"{name} {_version(name)}" for name in ("torch", "megatron-core", "deepspeed")]
    return ", ".join([f"megatron_crnet {own_version()}", *libraries, f"Python {platform.python_version()}"])


def own_version() -> str:
    """Of the source tree that runs, which need not be what is installed."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return _version("megatron_crnet")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
