"""The backups of a folder: how their files are called, and which of them are there.

    truthgpt-20261126T183000Z-1a2b3c4d.tar         a backup; .tar.age where it is encrypted
    .truthgpt-20261126T183000Z-1a2b3c4d.tar.part   one that is being written, locked by its writer (flock)

Nothing else in the folder is ever touched.
"""

from __future__ import annotations

import calendar
import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.local.swap import sync_folder
from orchestrator.ops.backup.errors import BackupError

ABANDONED_S = 86_400.0  # a part that nobody has written to for so long is abandoned, whoever holds it
AHEAD_S = 86_400.0  # a backup dated further in the future than that has a wrong date, or this machine has
LOCK_S = 10.0  # whoever looks whether a part is abandoned holds it for an instant
LOCK_STEP_S = 0.01

_NAME = re.compile(r"truthgpt-((\d{8}T\d{6}Z)-[0-9a-f]{8})\.tar(\.age)?")
_PART = re.compile(r"\.truthgpt-\d{8}T\d{6}Z-[0-9a-f]{8}\.tar(?:\.age)?\.part")
_STAMP = "%Y%m%dT%H%M%SZ"


@dataclass(frozen=True)
class Info:
    """One backup as its name and size tell it. `created` is Unix time in seconds."""

    id: str
    path: Path
    bytes: int
    created: float
    encrypted: bool

    def ahead(self, now: float) -> bool:
        """Whether its date is so far in the future that some clock is or was wrong."""
        return self.created > now + AHEAD_S


def stamp(at: float) -> str:
    """A Unix time as it stands in names, UTC."""
    return time.strftime(_STAMP, time.gmtime(at))


def new_id(at: float) -> str:
    """What a backup made at this Unix time is called."""
    return f"{stamp(at)}-{secrets.token_hex(4)}"


def file_name(id: str, encrypted: bool) -> str:
    return f"truthgpt-{id}.tar{'.age' if encrypted else ''}"


def infos(folder: Path) -> list[Info]:
    """The backups of a folder, newest first; a folder that does not exist has none. Raises OSError."""
    found = []
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        with contextlib.suppress(FileNotFoundError, ValueError):  # removed meanwhile; a date that does not exist
            created = float(calendar.timegm(time.strptime(match[2], _STAMP)))
            facts = os.lstat(folder / name)
            if stat.S_ISREG(facts.st_mode):
                found.append(Info(match[1], folder / name, facts.st_size, created, match[3] is not None))
    return sorted(found, key=lambda info: (info.created, info.id), reverse=True)


def newest(folder: Path) -> Info | None:
    """The newest backup, by names and sizes alone; None where there is none. Raises OSError."""
    return next(iter(infos(folder)), None)


@contextlib.contextmanager
def part(folder: Path, id: str, encrypted: bool) -> Iterator[tuple[int, Path]]:
    """A file to write a backup into, and where to put it when it is complete: see `publish`.

    It is removed again however this is left, unless it was published. Raises OSError, BlockingIOError where somebody
    else keeps it locked.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f".{file_name(id, encrypted)}.part"
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            lock(handle)
            if _is_at(handle, path):
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # somebody took it for abandoned before it was locked
    try:
        yield handle, path
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def lock(handle: int) -> None:
    """Lock what is being written, as long as it is open. Raises OSError, BlockingIOError where somebody else keeps it.

    A file system without locks is no error: the age alone tells then what is abandoned.
    """
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOCK_STEP_S)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            return


def publish(handle: int, path: Path) -> Path:
    """Give a complete part its name, once all of it is on the disk. Raises OSError or BackupError."""
    os.fsync(handle)
    if not _is_at(handle, path):
        raise BackupError(f"{path} was removed while it was being written", "make the backup again")
    target = path.with_name(path.name.removeprefix(".").removesuffix(".part"))
    os.rename(path, target)
    sync_folder(path.parent)
    return target


def clear_abandoned(folder: Path, now: float, remove: Callable[[Path, os.stat_result], object]) -> None:
    """Give to `remove` each part whose writer is gone, or has written nothing for a day. Raises OSError.

    It is locked meanwhile, so that nobody begins to write to it.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    for name in names:
        if _PART.fullmatch(name) is None:
            continue
        path = folder / name
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # it is gone, a link, or somebody else's
            continue
        try:
            if _abandoned(handle, now) and _is_at(handle, path):
                remove(path, os.fstat(handle))
        finally:
            os.close(handle)


def remove_abandoned(folder: Path, now: float, dry_run: bool = False) -> list[Path]:
    """Remove them; which those were. Raises OSError."""
    removed = []

    def remove(path: Path, facts: os.stat_result) -> None:
        removed.append(path)
        if not dry_run:
            path.unlink(missing_ok=True)

    clear_abandoned(folder, now, remove)
    return removed


def _abandoned(handle: int, now: float) -> bool:
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode):
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:  # it is locked, or nobody can tell
        return now - facts.st_mtime > ABANDONED_S


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False
