"""One writer per folder: a lock file that names its owner, on any file system that processes and hosts share.

The file is created with O_EXCL, which is atomic where flock is missing or local (NFS, Lustre, FUSE), in the folder
itself, so that another name of the folder finds it as well. Its owner touches it every few seconds. An owner of this
boot and process namespace has ended when no process of its number and start time runs; any other, when its file was
watched for `STALE_S` without being touched, so clocks of hosts are not compared. An owner that was suspended for so
long finds out before it writes again (`check`).
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_crnet.utils.errors import ConfigError, FolderTakenError

LOCK = "in_use.lock"
BEAT_S = 10.0
STALE_S = 120.0
"""Longer than a file server takes to recover, and than C code of a library keeps Python's threads waiting."""
POLL_S = 0.5


@dataclass(frozen=True)
class Owner:
    """A process that holds a lock.

    Attributes:
        kernel: boot and process namespace, inside which process numbers are unique.
        started: clock ticks from boot to the start of the process, as process numbers are used again.
        token: unique to this lock.
    """

    host: str
    pid: int
    kernel: str
    started: int
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"


def this_process() -> Owner:
    """A new owner."""
    return Owner(socket.gethostname(), os.getpid(), _kernel(), start_ticks(os.getpid()) or 0)


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # without /proc every other process is judged by its heartbeat
        return secrets.token_hex(8)


def start_ticks(pid: int) -> int | None:
    """Start time of a running process; None if there is none."""
    try:
        # the name in parentheses may hold anything
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class FolderLock:
    """A lock that this process holds until `release`; see `take`.

    Args:
        what: the folder as the user knows it, for messages.
    """

    def __init__(self, file: Path, owner: Owner, what: str) -> None:
        self.file, self.owner, self.what = file, owner, what
        self.taken_by: Owner | None = None
        """The process that has taken the folder over, as of the last heartbeat."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="folder lock")
        self._thread.start()

    def check(self) -> None:
        """Raise FolderTakenError if another process holds the folder now; called before each write."""
        self._touch()
        if self.taken_by is not None:
            raise FolderTakenError(
                f"{self.what} was taken over by {self.taken_by} while this process was suspended for more than "
                f"{STALE_S:g} s: nothing more is written here; continue with that one"
            )

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._touch()

    def _touch(self) -> None:
        with suppress(OSError):  # of a file server that is away for a while
            found = _read(self.file)
            if found is None:  # removed by hand
                with suppress(FileExistsError):
                    _create(self.file, self.owner)
            elif found.owner is not None and found.token != self.owner.token:
                self.taken_by = found.owner
            else:
                os.utime(self.file)

    def release(self) -> None:
        """Let others take the folder; in a forked child nothing happens."""
        if os.getpid() != self.owner.pid:
            return
        self._stop.set()
        self._thread.join()
        HELD.pop(self.owner.token, None)
        with suppress(OSError):
            found = _read(self.file)
            if found is not None and found.token == self.owner.token:
                self.file.unlink()


HELD: dict[str, FolderLock] = {}
"""Locks of this process by token: it may write a folder under two names."""


@dataclass(frozen=True)
class _Found:
    """A lock file: its bytes, when it was touched last, and its owner if it is whole."""

    content: bytes
    touched: int
    owner: Owner | None

    @property
    def token(self) -> str | None:
        return self.owner.token if self.owner else None


def _read(file: Path) -> _Found | None:
    try:
        # opened anew each time, which is when a file server is asked
        with file.open("rb") as opened:
            content, touched = opened.read(), os.fstat(opened.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    try:
        owner = Owner(**json.loads(content))
        valid = isinstance(owner.pid, int) and isinstance(owner.token, str)
    except (ValueError, TypeError, RecursionError):
        valid = False
    return _Found(content, touched, owner if valid else None)


def _create(file: Path, owner: Owner) -> None:
    """Raises FileExistsError where there is one, another OSError where none can be written."""
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        with os.fdopen(descriptor, "w") as opened:
            opened.write(json.dumps(asdict(owner)) + "\n")
    except OSError:
        with suppress(OSError):
            file.unlink()
        raise


def take(file: Path, what: str, stale_s: float = STALE_S) -> FolderLock | None:
    """Take a lock, also from an owner that has ended; None if this process holds it already.

    Args:
        file: the lock; its folder exists.
        what: the folder as the user knows it, for messages.
        stale_s: how long a lock of another host is watched for a heartbeat.

    Raises:
        ConfigError: another process holds it.
        OSError: the lock cannot be written.
    """
    owner = this_process()
    while True:
        try:
            _create(file, owner)
        except FileExistsError:
            found = _read(file)
            if found is not None and found.token in HELD and found.owner is not None and found.owner.pid == os.getpid():
                return None
            stale = _wait_until_stale(file, found, what, stale_s) if found is not None else None
            if stale is None or not _replace(file, stale, owner, what, stale_s):
                continue
            print(f"{what} was left by {stale.owner or 'a process'}, which has ended: taken over", file=sys.stderr)
        lock = HELD[owner.token] = FolderLock(file, owner, what)
        return lock


def _wait_until_stale(file: Path, found: _Found, what: str, stale_s: float) -> _Found | None:
    """Wait until it is certain that a lock's owner has ended; None if the lock is gone meanwhile.

    Raises:
        ConfigError: the owner lives.
    """
    first, kernel, started = found, _kernel(), time.monotonic()
    announced = False
    while True:
        if found.owner is not None and found.owner.kernel == kernel:
            if start_ticks(found.owner.pid) == found.owner.started:
                raise _in_use(file, found.owner, what)
            return found
        if (found.content, found.touched) != (first.content, first.touched):
            raise _in_use(file, found.owner, what)
        waited = time.monotonic() - started
        if waited >= stale_s:
            return found
        if not announced and waited >= 2 * POLL_S:  # a lock that is being written is whole by then
            announced, by = True, found.owner or "an unknown process"
            line = f"{what} was last used by {by}: waiting up to {stale_s:g} s for a heartbeat"
            print(line, file=sys.stderr, flush=True)
        time.sleep(POLL_S)
        again = _read(file)
        if again is None:
            return None
        found = again


def _in_use(file: Path, owner: Owner | None, what: str) -> ConfigError:
    return ConfigError(
        f"{what} is in use by {owner or 'another process'}: wait until that has ended, or choose another place (where "
        f"no such process runs any more, remove {file})"
    )


def _replace(file: Path, stale: _Found, owner: Owner, what: str, stale_s: float) -> bool:
    """Put a lock in the place of a stale one; False if another process has been faster.

    Who does that first takes a lock on the stale one, a file named after its content: of many that have read it, one at
    a time can replace it, and only if it is still there.
    """
    claim = file.with_name(f".{file.name}.{hashlib.sha256(stale.content).hexdigest()[:16]}")
    try:
        _create(claim, owner)
    except FileExistsError:
        found = _read(claim)
        dead = _wait_until_stale(claim, found, what, stale_s) if found is not None else None
        if dead is None or not _replace(claim, dead, owner, what, stale_s):
            return False
    try:
        current = _read(file)
        if current is None or current.content != stale.content:
            return False
        own = file.with_name(f".{file.name}.{owner.token}")
        try:
            _create(own, owner)
            own.replace(file)
        finally:
            own.unlink(missing_ok=True)
        return True
    finally:
        claim.unlink(missing_ok=True)


@contextmanager
def holding(file: Path, what: str) -> Iterator[None]:
    """Hold a lock for a block; see `take`."""
    lock = take(file, what)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
