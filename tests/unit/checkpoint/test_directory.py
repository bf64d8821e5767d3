from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from megatron_crnet.checkpoint import directory
from megatron_crnet.checkpoint.directory import (
    DAMAGED,
    MANIFEST,
    PARTIAL,
    REPLACED,
    checkpoint_name,
    checkpoints,
    complete,
    damage,
    file_entries,
    name_latest,
    quarantine,
    remove_partial,
    restore_replaced,
    steps_to_prune,
)
from megatron_crnet.utils.errors import CheckpointError


def make(folder: Path, step: int, content: str = "weights") -> Path:
    partial, target = folder / f"{PARTIAL}{checkpoint_name(step)}", folder / checkpoint_name(step)
    partial.mkdir(parents=True)
    (partial / "data").write_text(content)
    complete(partial, target, file_entries(partial, ["data"]))
    return target


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [(None, None, []), (None, 20, []), (2, None, [10, 20, 30]), (2, 20, [10, 30]), (9, None, []), (1, 10, [])],
)
def test_what_the_policy_gives_up(keep_last: int | None, keep_every: int | None, expected: list[int]) -> None:
    assert steps_to_prune([50, 10, 30, 20, 40], keep_last, keep_every, good=51) == expected


def test_only_whole_folders_with_a_final_name_count(tmp_path: Path) -> None:
    make(tmp_path, 10)
    make(tmp_path, 9)
    for name in (f"{PARTIAL}step_00000011", "step_latest", "rejected_step_00000012"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000009", "step_00000010"]


def test_every_kind_of_damage_is_named(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 1)
    assert damage(checkpoint) is None
    (checkpoint / "data").write_text("Weights")
    assert damage(checkpoint) == "has another checksum in data than in manifest.json"
    assert damage(checkpoint, share=1, shares=2) is None
    (checkpoint / "data").write_text("w")
    assert damage(checkpoint) == "has 1 bytes in data instead of 7"
    (checkpoint / "data").unlink()
    assert damage(checkpoint) == "lacks data"
    (checkpoint / MANIFEST).write_text(json.dumps({"format": 99, "files": {}}))
    assert damage(checkpoint) == "has format 99, this version reads 1"
    (checkpoint / MANIFEST).write_text("{")
    assert str(damage(checkpoint)).startswith("cannot be read")
    (checkpoint / MANIFEST).unlink()
    assert damage(checkpoint) == "has no manifest.json"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_file_system_that_fails_damages_nothing(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make(tmp_path, 1)

    def fails(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(directory, "checksum", fails)
    with pytest.raises(CheckpointError, match=r"step_00000001 cannot be read now .*: start again when"):
        damage(checkpoint)


def test_no_old_name_stays_where_the_new_one_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "no space")

    assert name_latest(make(tmp_path, 1))
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    newer = make(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(directory, "replace_text", full)
        assert not name_latest(newer)
    assert not (tmp_path / "latest").exists()


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    make(tmp_path, 1, "old")
    assert (make(tmp_path, 1, "new") / "data").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("killed", ["before the new one was renamed", "after it"])
def test_a_kill_while_replacing_leaves_one_whole_checkpoint(tmp_path: Path, killed: str) -> None:
    old = make(tmp_path, 1, "old")
    old.rename(tmp_path / f"{REPLACED}{old.name}")
    if killed == "after it":
        make(tmp_path, 1, "new")
    restore_replaced(tmp_path)
    assert (old / "data").read_text() == ("new" if killed == "after it" else "old")
    assert damage(old) is None
    assert not list(tmp_path.glob(".*"))


def test_the_checkpoint_that_a_bad_step_would_go_back_to_stays() -> None:
    assert steps_to_prune([10, 20, 30], 1, None, good=30) == [10]
    # 20 and 30 hold the weights of step 18, after which steps were skipped
    assert steps_to_prune([5, 10, 20, 30], 1, None, good=18) == [5, 20]
    assert steps_to_prune([10, 20], 1, None, good=10) == [10]


def test_rejected_checkpoints_are_out_of_the_way_and_latest_goes_back(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        name_latest(make(tmp_path, step))
    assert quarantine(tmp_path, 2) == tmp_path / "step_00000001"
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    assert (tmp_path / "rejected_step_00000003" / "data").exists()
    assert quarantine(tmp_path, 1, DAMAGED) is None
    assert (tmp_path / "damaged_step_00000001" / "data").exists()
    assert not (tmp_path / "latest").exists()


@pytest.mark.fault("F6")
def test_other_names_and_files_in_the_folder_are_no_checkpoints_and_do_no_harm(tmp_path: Path) -> None:
    make(tmp_path, 1)
    for name in ("step_²", "step_", "step_1e3", f"{PARTIAL}step_00000003"):
        (tmp_path / name).mkdir()
    (tmp_path / f"{PARTIAL}step_1").write_text("a file")
    (tmp_path / "step_7").write_text("a file")
    restore_replaced(tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001"]
    remove_partial(tmp_path)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.fault("B1")
def test_what_was_set_aside_is_never_replaced_or_removed(tmp_path: Path) -> None:
    for content in ("first", "second"):
        make(tmp_path, 1, "kept")
        make(tmp_path, 2, content)
        quarantine(tmp_path, 2)
    aside = [tmp_path / f"rejected_step_00000002{suffix}" for suffix in ("", ".2")]
    assert [(path / "data").read_text() for path in aside] == ["first", "second"]
    partial = make(tmp_path, 3).rename(tmp_path / f"{PARTIAL}again")
    with pytest.raises(FileExistsError):
        complete(partial, aside[0], file_entries(partial, ["data"]))
    assert (aside[0] / "data").read_text() == "first"
