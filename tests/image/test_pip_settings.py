"""How this machine's pip settings are brought into a build. Needs no container, so `make test` runs it."""

from __future__ import annotations

from pathlib import Path

from tests.image.pip_settings import build_settings


def test_local_folders_are_mounted_and_named_as_they_are_mounted(tmp_path: Path) -> None:
    wheels, index = tmp_path / "wheels", tmp_path / "index" / "simple"
    certificates = tmp_path / "ca.crt"
    for folder in (wheels, index):
        folder.mkdir(parents=True)
    certificates.touch()
    shown = f"""\
:env:.find-links='{wheels}'
:env:.timeout='60'
global.cache-dir='/somewhere'
global.cert='{certificates}'
global.extra-index-url='file://{index} https://example.org/simple'
global.find-links='/elsewhere'
"""
    settings = build_settings(shown)
    assert settings.mounts == {wheels: "/mnt/0", certificates: "/mnt/1", index.parent: "/mnt/2"}
    assert settings.text == (
        "[global]\nfind-links = /mnt/0\ntimeout = 60\ncert = /mnt/1\n"
        "extra-index-url = file:///mnt/2/simple https://example.org/simple\n"
    )


def test_without_settings_the_file_is_empty() -> None:
    assert build_settings("").text == "[global]\n"
