"""Installed versions, from package metadata: nothing is imported."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence

LIBRARIES = ("torch", "triton", "megatron-core", "deepspeed", "apex", "transformer-engine", "megatron_crnet")
NOT_INSTALLED = "not installed"


@functools.cache
def version_line() -> str:
    """This project, Python and the libraries that training depends on, in one line."""
    from megatron_crnet import __version__  # of the source tree that runs, which need not be the installed one

    libraries = [f"{name} {_version(name)}" for name in ("torch", "megatron-core", "deepspeed")]
    return ", ".join([f"megatron_crnet {__version__}", *libraries, f"Python {platform.python_version()}"])


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
