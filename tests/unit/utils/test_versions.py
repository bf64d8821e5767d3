"""Versions of libraries, by package or by module."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import megatron_crnet
from megatron_crnet.utils import versions
from megatron_crnet.utils.versions import NOT_INSTALLED, library_versions, version_line


def test_a_library_is_found_in_a_package_of_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "other_name-1.2.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other-name\nVersion: 1.2.3\n")
    (about / "top_level.txt").write_text("imported_as_this\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(versions, "_packages", versions._packages.__wrapped__)
    assert library_versions(("imported_as_this", "nowhere")) == {"imported_as_this": "1.2.3", "nowhere": NOT_INSTALLED}


def test_the_version_is_that_of_the_source_tree() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert version_line().startswith(f"megatron_crnet {project['version']}, ")
    assert megatron_crnet.__version__ == project["version"]
