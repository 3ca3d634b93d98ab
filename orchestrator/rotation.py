"""Log files that do not grow for ever. NAME.1 is the newest of those that were moved aside."""

from __future__ import annotations

import fcntl
import itertools
import os
from pathlib import Path

STDERR = 2
UNIT_BYTES = 1 << 16  # of one write


class LogFile:
    """A file to which several processes append whole lines, and which whoever finds it too large moves aside.

    Nobody waits for anybody: O_APPEND keeps each write in one piece, and whoever still has the file that was moved
    writes into it once more at most. Standard error, where it is this file, follows. Raises OSError where the file
    cannot be had.
    """

    def __init__(self, path: Path, max_bytes: int, keep: int) -> None:
        self._path, self._max_bytes, self._keep = path, max_bytes, keep
        self.unit_bytes = min(UNIT_BYTES, max_bytes)
        self._fd = -1
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._open()

    def write(self, data: bytes) -> int:
        """Append what makes whole lines; how many bytes of it were written. Raises OSError."""
        if self._moved():
            self._open()
        size = os.fstat(self._fd).st_size
        if size and size + len(data) > self._max_bytes:
            self._rotate()
        return os.write(self._fd, data)

    def _open(self) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if self._fd < 0:
            # what is written there by others, a crash's stack for one, goes along
            self._is_stderr = _same(os.fstat(fd), _stat_fd(STDERR))
        else:
            os.close(self._fd)
        if self._is_stderr:
            os.dup2(fd, STDERR)
        self._fd = fd

    def _moved(self) -> bool:
        try:
            return not _same(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            return True

    def _rotate(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process is at it
            return
        try:
            if not self._moved():
                shift(self._path, self._keep)
                os.replace(self._path, f"{self._path}.1")
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # children have this descriptor, too: closing it would not unlock
        self._open()


def shift(path: Path, keep: int) -> None:
    """Make room for PATH.1: the others move up, and only `keep` - 1 of them stay."""
    for number in itertools.count(keep):
        try:
            os.unlink(f"{path}.{number}")
        except FileNotFoundError:
            if number > keep:  # what was kept when more were
                break
    for number in range(keep - 1, 0, -1):
        try:
            os.replace(f"{path}.{number}", f"{path}.{number + 1}")
        except FileNotFoundError:
            continue


def trim(path: Path, max_bytes: int, keep: int) -> bool:
    """Copy a file that is too large to PATH.1 and empty it, for a program that appends to it and knows nothing of it.

    What is written between the last look and the emptying, some microseconds, is lost. Whether there was anything to
    do; raises OSError.
    """
    try:
        if path.stat().st_size <= max_bytes:
            return False
    except FileNotFoundError:
        return False
    shift(path, keep)
    with path.open("r+b", buffering=0) as log, open(f"{path}.1", "wb") as aside:
        while block := log.read(1 << 20):
            aside.write(block)
            aside.flush()
        log.truncate(0)
    return True


def _same(one: os.stat_result, other: os.stat_result | None) -> bool:
    return other is not None and (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def _stat_fd(fd: int) -> os.stat_result | None:
    try:
        return os.fstat(fd)
    except OSError:  # it is closed
        return None
