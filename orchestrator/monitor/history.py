"""The metric history: a line of figures a minute, in a file a day, in the folder `metrics` of the home.

Several processes may write there, each whole lines with one write(2) at the end of the file, under a lock (flock(2))
so that what a full disk has cut short can be taken back. Readers need no lock: a line ends with its newline.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger(__name__)

FOLDER = "metrics"
EVERY_S = 60.0
LOCK_S = 2.0  # another writer needs some 0.1 ms; one that is suspended would be waited for without end
LOCK_STEP_S = 0.01
LINE_BYTES = 1 << 20  # a line has some 2,000; a longer one is none of ours
_DAY = re.compile(r"(\d{4}-\d{2}-\d{2})\.jsonl")


def folder_of(home: Path) -> Path:
    return home / FOLDER


def file_of(home: Path, at: float) -> Path:
    """Of the UTC day of this Unix time."""
    return folder_of(home) / f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d}.jsonl"


def stamp(at: float) -> str:
    """RFC 3339 in UTC, to the millisecond."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class History:
    """What one process writes; `instance` tells its lines from those of others."""

    def __init__(self, home: Path, instance: str | None = None, clock: Callable[[], float] = time.time) -> None:
        self._home, self._clock = home, clock
        self._instance = instance or f"{socket.gethostname()}:{os.getpid()}"
        self._fails = False
        self._writing: threading.Thread | None = None

    def write(self, figures: Mapping[str, Any], at: float) -> None:
        """Add the line of this Unix time. Blocks as long as the disk does; what fails is logged and raises nothing."""
        try:
            self._append(figures, at)
        except (OSError, ValueError, TypeError, OverflowError) as error:
            self._failed(str(error))
        else:
            if self._fails:
                log.warning("the metric history is written again")
            self._fails = False

    async def run(self, figures: Callable[[], Mapping[str, Any]]) -> None:
        """Write a line at every full minute, until cancelled. A disk that stalls holds up one thread, and never this.

        The thread has until the next minute: while it still hangs then, that minute has no line.
        """
        while True:
            await asyncio.sleep(pause_s(self._clock()))
            if self._writing is not None and self._writing.is_alive():
                self._failed("the disk does not answer")
                continue
            try:
                arguments = (figures(), self._clock())
                self._writing = threading.Thread(target=self.write, args=arguments, name="history", daemon=True)
                self._writing.start()
            except Exception as error:  # figures that cannot be had, or a thread: the next minute may have them
                self._writing = None
                self._failed(f"{type(error).__name__}: {error}")

    def _append(self, figures: Mapping[str, Any], at: float) -> None:
        row = {**figures, "time": stamp(at), "instance": self._instance}
        line = json.dumps(row, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        path = file_of(self._home, at)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _lock(fd, path)
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":  # its writer was not there any more to take it back
                line = b"\n" + line
            try:
                written = os.write(fd, line)
                while written < len(line):  # a full disk takes a part, and says with the next why
                    written += os.write(fd, line[written:])
            except OSError:
                os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)

    def _failed(self, why: str) -> None:
        if not self._fails:
            log.error("the metric history cannot be written: %s", why)
        self._fails = True


def pause_s(now: float) -> float:
    """Until the next full minute; a timer that went off a moment early has had its minute."""
    left = EVERY_S - now % EVERY_S
    return left if left > 1.0 else left + EVERY_S


def read(home: Path, since: float, until: float) -> Iterator[dict[str, Any]]:
    """The lines from `since` to before `until` (Unix time), as they were written; what is no whole line is passed over.

    Raises FileNotFoundError where there is no history at all, and OSError.
    """
    first, last = stamp(since), stamp(until)
    for path in sorted(folder_of(home).iterdir()):
        found = _DAY.fullmatch(path.name)
        if found is None or not first[:10] <= found[1] <= last[:10]:
            continue
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # cleaned up meanwhile
            for line in _whole_lines(file):
                row = _row(line)
                if row is not None and first <= row["time"] < last:
                    yield row


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    torn = False
    while piece := file.readline(LINE_BYTES):
        whole = piece.endswith(b"\n")
        if whole and not torn:
            yield piece
        torn = not whole


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("time"), str) else None


def _lock(fd: int, path: Path) -> None:
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"another writer has held {path} for {LOCK_S:g} s") from None
            time.sleep(LOCK_STEP_S)
