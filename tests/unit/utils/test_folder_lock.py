"""One writer per folder: what is in use, what is stale, and who gets it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_crnet.utils.errors import ConfigError, FolderTakenError
from megatron_crnet.utils.folder_lock import BEAT_S, STALE_S, Owner, _read, _replace, holding, take, this_process

HOLDER = """
import sys, time
from pathlib import Path
from megatron_crnet.utils.folder_lock import take
take(Path(sys.argv[1]), "the folder")
print("held", flush=True)
time.sleep(600)
"""
OTHER = Owner("elsewhere", 12, "another boot", 345)


def hold_elsewhere(file: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def write(file: Path, owner: Owner) -> None:
    file.write_text(json.dumps(dataclasses.asdict(owner)))


@pytest.mark.fault("B5", "L1")
def test_a_folder_in_use_is_refused_by_every_name_and_free_when_its_process_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    process = hold_elsewhere(tmp_path / "folder" / "lock")
    try:
        names = (
            tmp_path / "folder",
            tmp_path / "link",
            tmp_path / "link" / ".." / "folder",
            Path(os.path.relpath(tmp_path / "link")),
        )
        for name in names:
            with pytest.raises(ConfigError, match=rf"the folder is in use by process {process.pid} on host "):
                take(name / "lock", "the folder")
    finally:
        process.kill()
    # not even waited for: a process that has ended holds nothing
    deadline = time.monotonic() + 30
    while True:
        try:
            with holding(tmp_path / "folder" / "lock", "the folder"):
                assert json.loads((tmp_path / "folder" / "lock").read_text())["pid"] == os.getpid()
            break
        except ConfigError:
            assert time.monotonic() < deadline
    process.wait()
    assert f"the folder was left by process {process.pid}" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "folder").iterdir()] == []


@pytest.mark.fault("B5", "L1")
def test_a_later_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    me = this_process()
    write(tmp_path / "lock", dataclasses.replace(me, started=me.started - 1))
    with holding(tmp_path / "lock", "it"):
        assert json.loads((tmp_path / "lock").read_text())["started"] == me.started


@pytest.mark.fault("B5", "L1")
def test_a_lock_of_another_host_is_stale_when_nobody_touches_it(tmp_path: Path) -> None:
    def take_over(content: str) -> int:
        folder = tmp_path / f"of {content.encode().hex()[:40]}"
        folder.mkdir()
        (folder / "lock").write_text(content)
        with holding(folder / "lock", "it"):
            owner: int = json.loads((folder / "lock").read_text())["pid"]
        assert list(folder.iterdir()) == []
        return owner

    contents = [json.dumps(dataclasses.asdict(OTHER)), "", "{", "[]", '{"pid": "x"}']
    with ThreadPoolExecutor(len(contents)) as threads:
        assert set(threads.map(take_over, contents)) == {os.getpid()}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds instead of minutes, in the same proportion."""
    assert STALE_S >= 10 * BEAT_S
    monkeypatch.setattr("megatron_crnet.utils.folder_lock.BEAT_S", 0.1)
    monkeypatch.setattr("megatron_crnet.utils.folder_lock.POLL_S", 0.02)
    monkeypatch.setattr("megatron_crnet.utils.folder_lock.STALE_S", 1.0)
    monkeypatch.setattr(take, "__defaults__", (1.0,))


@pytest.mark.fault("B5", "L1")
def test_a_lock_of_another_host_that_is_touched_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "lock", OTHER)
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(0.1):
            os.utime(tmp_path / "lock")

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="in use by process 12 on host elsewhere"):
            take(tmp_path / "lock", "it")
    finally:
        stop.set()
        thread.join()


@pytest.mark.fault("B5", "L1")
def test_whoever_was_taken_over_writes_nothing_more(tmp_path: Path) -> None:
    lock = take(tmp_path / "lock", "the folder")
    assert lock is not None
    lock.check()
    (tmp_path / "lock").unlink()  # by hand: nobody else has come
    lock.check()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    write(tmp_path / "lock", OTHER)
    with pytest.raises(FolderTakenError, match="taken over by process 12 on host elsewhere"):
        lock.check()
    lock.release()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == 12


RACER = """
import sys, time
from pathlib import Path
from megatron_crnet.utils.errors import ConfigError
from megatron_crnet.utils import folder_lock
file, start = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0, start - time.time()))
try:
    folder_lock.take(file, "it")
    print("won", flush=True)
    sys.stdin.read()
except ConfigError:
    print("refused", flush=True)
"""


@pytest.mark.fault("B5", "L1")
def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    me = this_process()
    write(tmp_path / "lock", dataclasses.replace(me, started=me.started - 1))
    start = str(time.time() + 1.5)
    command = [sys.executable, "-c", RACER, str(tmp_path / "lock"), start]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    said = [racer.stdout.readline() for racer in racers if racer.stdout]  # while the winner holds it
    for racer in racers:
        racer.communicate()
    assert sorted(said) == ["refused\n"] * 7 + ["won\n"]


@pytest.mark.fault("B5", "L1")
def test_who_comes_late_leaves_the_new_lock_alone(tmp_path: Path) -> None:
    me = this_process()
    write(tmp_path / "lock", dataclasses.replace(me, started=me.started - 1))
    stale = _read(tmp_path / "lock")
    assert stale is not None
    write(tmp_path / "lock", OTHER)  # another process has taken it over since
    node = (tmp_path / "lock").stat().st_ino
    assert not _replace(tmp_path / "lock", stale, me, "it", 1.0)
    assert (tmp_path / "lock").stat().st_ino == node
    assert os.listdir(tmp_path) == ["lock"]


@pytest.mark.fault("B5", "L1")
def test_a_process_that_ended_while_it_took_a_lock_over_is_no_obstacle(tmp_path: Path) -> None:
    me, lock = this_process(), tmp_path / "lock"
    write(lock, dataclasses.replace(me, started=me.started - 1))
    claim = tmp_path / f".lock.{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"
    write(claim, dataclasses.replace(me, started=me.started - 2))
    with holding(lock, "it"):
        assert os.listdir(tmp_path) == ["lock"]


def test_one_process_may_hold_a_folder_under_two_names(tmp_path: Path) -> None:
    with holding(tmp_path / "lock", "it"):
        with holding(tmp_path / "lock", "it"):
            pass
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()
