"""Writes the audit log (auditlog.py). Blocking: for threads and commands.

Writers lock `head`, go on from the last line that is there, and write a batch of lines with one write(2). A line that
its writer could not finish is cut off by the next one, which says so in a `recovered` event. Lines that are known to
have been there and are gone are never papered over: the chain goes on behind them, and the hole stays for all to see.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.auditlog import (
    CURRENT,
    HEAD,
    Mark,
    chained,
    check_key,
    encode,
    end_of_lines,
    first_line,
    folder_of,
    last_mark,
    mark_text,
    parse,
    read_head,
    rotated_name,
)
from orchestrator.fingerprint import Fingerprint
from orchestrator.ownership import make_folder, open_owned

LOCK_S = 1.0  # another writer needs some 0.1 ms; one that is suspended would be waited for without end
LOCK_STEP_S = 0.002


class AuditLog:
    """One writer's hold on the log in `home`. Its methods raise OSError where the log cannot be written.

    And AuditLogError where it was written with another key.
    """

    def __init__(self, home: Path, prints: Fingerprint, max_bytes: int, lock_s: float = LOCK_S) -> None:
        self.folder = folder_of(home)
        self._prints, self._max_bytes, self._lock_s = prints, max_bytes, lock_s
        self._lock = self._file = -1
        self._size = 0  # of the current file, as this writer left it
        self._first = 0  # number of its first line
        self._last = Mark()
        self._repairs: list[bytes] = []  # events about what was found, still to be written
        self._unsynced = False

    def append(self, events: Sequence[bytes]) -> int:
        """Write events, as `encode` made them; how many. Fewer than all where the rest found no room."""
        with self._locked():
            self._find_end()
            del self._repairs[: self._write(self._repairs) if self._repairs else 0]
            return self._write(events)

    def sync(self) -> None:
        """Have what was appended survive a power failure, then note in `head` how far that is."""
        if not self._unsynced:
            return
        if self._file < 0:  # it could not be opened after a rotation
            raise OSError(errno.EBADF, f"{self.folder / CURRENT} is not open")
        last = self._last
        os.fsync(self._file)
        with self._locked():
            known = read_head(self.folder, self._prints)
            if known is None or known.seq < last.seq:
                self._note(last)
        self._unsynced = False

    def close(self) -> None:
        for fd in (self._lock, self._file):
            if fd >= 0:
                os.close(fd)
        self._lock = self._file = -1

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        deadline = time.monotonic() + self._lock_s
        while True:
            if self._lock < 0:
                make_folder(self.folder.parent)
                make_folder(self.folder)
                self._lock = open_owned(self.folder / HEAD, os.O_RDWR)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another writer has held {self.folder / HEAD} for {self._lock_s:g} s") from None
                time.sleep(LOCK_STEP_S)
                continue
            if _is_at(self._lock, self.folder / HEAD):
                break
            os.close(self._lock)  # somebody put another file there: that one is the lock now
            self._lock = -1
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _find_end(self) -> None:
        """Where the chain goes on; what is not as it was left becomes an event."""
        path = self.folder / CURRENT
        if self._file >= 0 and _is_at(self._file, path) and os.fstat(self._file).st_size == self._size:
            return
        self._size = -1  # until all of this has been found
        self._open()
        check_key(self.folder, self._prints)
        size = end_of_lines(self._file)
        found = parse(first_line(self._file)) if size else None
        last, head = last_mark(self._file, size, self.folder, self._prints), read_head(self.folder, self._prints)
        # what this writer has seen counts as much as what `head` has
        known = max(head or Mark(), self._last, key=lambda mark: mark.seq)
        missing = known.seq - (last or Mark()).seq
        spoilt = last is None and size > 0
        facts = {
            "cut_bytes": os.fstat(self._file).st_size - size, "missing": 0 if spoilt else max(0, missing),
            "head_missing": head is None and last is not None, "last_line_spoilt": spoilt,
        }  # fmt: skip
        os.ftruncate(self._file, size)
        if any(facts.values()):
            kept = {name: value for name, value in facts.items() if value}
            self._repairs.append(encode("recovered", time.time(), {"pid": os.getpid(), **kept}))
        self._first = found.seq if found is not None else 0
        self._last = last if last is not None and missing <= 0 else known
        self._size = size

    def _open(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        # a command that runs as root begins a file, too, and the gateway must be able to go on with it
        self._file = open_owned(self.folder / CURRENT, os.O_RDWR | os.O_APPEND)

    def _write(self, events: Sequence[bytes]) -> int:
        """Chain and write; how many events are in the files now. Raises OSError where not even one is."""
        done = 0
        while done < len(events):
            try:
                done += self._write_into_one_file(events[done:])
            except OSError:
                if done:
                    break
                raise
        return done

    def _write_into_one_file(self, events: Sequence[bytes]) -> int:
        """As many as fit, at least one; in one write(2)."""
        batch: list[bytes] = []
        size, last = self._size, self._last
        for event in events:
            line, mark = chained(event, last, self._prints)
            if size and size + len(line) > self._max_bytes:
                if batch:
                    break
                self._rotate()
                size = 0
            batch.append(line)
            size, last = size + len(line), mark
        if not self._size:
            self._first = self._last.seq + 1
        self._put(b"".join(batch))
        self._size, self._last, self._unsynced = size, last, True
        return len(batch)

    def _put(self, data: bytes) -> None:
        """All of it or nothing."""
        if not self._size and not os.pread(self._lock, 1, 0):
            self._note(Mark())  # a log without its head is one that somebody has tampered with
        try:
            done = os.write(self._file, data)
            while done < len(data):
                done += os.write(self._file, data[done:])
        except OSError:
            os.ftruncate(self._file, self._size)
            raise

    def _rotate(self) -> None:
        """Move the current file aside; it is on the disk before a line follows it."""
        os.fsync(self._file)
        self._note(self._last)
        target = self.folder / rotated_name(self._first)
        if target.exists():
            raise FileExistsError(f"{target} is there already")
        os.rename(self.folder / CURRENT, target)
        self._size = 0
        self._open()
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _note(self, mark: Mark) -> None:
        """Write `head` in one write of a fixed length, so that it is the old one or the new one."""
        os.pwrite(self._lock, mark_text(mark, self._prints).encode(), 0)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
