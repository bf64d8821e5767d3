from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from megatron_crnet.utils.errors import ConfigError
from megatron_crnet.utils.files import atomic_files, atomic_folder, replace_text
from megatron_crnet.utils.folder_lock import start_ticks, this_process


def test_a_text_that_cannot_be_written_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    replace_text(path, "older\n")
    replace_text(path, "old\n")
    assert path.read_text() == "old\n"
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "begun \ud800")
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.fault("B5", "L1")
def test_two_processes_do_not_write_one_set_of_files_or_one_folder(tmp_path: Path) -> None:
    other = dataclasses.replace(this_process(), pid=os.getppid(), token="another")
    other = dataclasses.replace(other, started=start_ticks(other.pid) or 0)
    for name in ("set.idx.lock", "folder.lock"):
        (tmp_path / name).write_text(json.dumps(dataclasses.asdict(other)))
    with (
        pytest.raises(ConfigError, match=rf"set.idx is in use by process {other.pid}"),
        atomic_files(tmp_path / "set.bin", tmp_path / "set.idx", overwrite=True),
    ):
        raise AssertionError
    with (
        pytest.raises(ConfigError, match=rf"folder is in use by process {other.pid}"),
        atomic_folder(tmp_path / "folder", overwrite=True),
    ):
        raise AssertionError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.lock", "set.idx.lock"]


def test_a_place_is_known_to_be_writable_before_the_work(tmp_path: Path) -> None:
    with atomic_files(tmp_path / "set.bin", tmp_path / "set.idx", overwrite=False) as (data, index):
        assert data.is_file()
        index.touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.bin", "set.idx"]
