"""What the code imports, what pyproject.toml asks for and what the requirements files pin are the same packages."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
# taken where a base image brings them
BROUGHT = {"apex", "transformer_engine", "triton"}


def normal(name: str) -> str:
    return re.split(r"[\[<>=~! ;]", name)[0].lower().replace("_", "-")


def imported_modules() -> set[str]:
    found = set()
    for path in (*(ROOT / "megatron_crnet").glob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "pretrain_crnet.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"megatron_crnet"} - BROUGHT


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {normal(name) for name in project["dependencies"]}
    optional = {normal(name) for names in project["optional-dependencies"].values() for name in names}
    distributions = packages_distributions()
    missing = {
        module
        for module in imported_modules()
        if not (declared | optional) & {normal(name) for name in [*distributions.get(module, []), module]}
    }
    assert missing == set()


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [
        line.partition("#")[0].strip()
        for name in ("requirements-torch.txt", "requirements.txt")
        for line in (ROOT / name).read_text().splitlines()
    ]
    assert {normal(name) for name in project["dependencies"]} <= {normal(pin) for pin in pins if "==" in pin}
