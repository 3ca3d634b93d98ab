"""Log lines are written by a thread: neither a full pipe nor a slow disk holds up the event loop."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

QUEUE_BYTES = 8 << 20  # of lines that wait; more are lost, counted and told of
COLLECT_S = 0.05  # lines that come within this time of each other are written together
PROMPT_S = 0.01  # the longest that a line of warning and above waits for being written
CLOSE_S = 2.0
UNMADE_BYTES = 2048  # that a line counts for until it is made: its record is as large

Line = bytes | Callable[[], bytes]  # a line, or what makes it when it is written; that raises nothing


class Target(Protocol):
    """Where lines go to. A write of up to `unit_bytes` stays in one piece, whoever else writes there."""

    unit_bytes: int

    def write(self, data: bytes) -> int:
        """How many of the bytes were written. Raises OSError."""


class Descriptor:
    """An open file such as standard error, even one that somebody has made non-blocking."""

    unit_bytes = select.PIPE_BUF

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: bytes) -> int:
        while True:
            try:
                return os.write(self._fd, data)
            except BlockingIOError:
                select.select([], [self._fd], [])


class Writer:
    """Takes lines at once and writes them in order. `lost_line(count)` is the line that tells of lost ones.

    What cannot be queued, because writing stalls, or cannot be written, because the disk is full, is lost and counted.
    """

    def __init__(self, target: Target, lost_line: Callable[[int], bytes], queue_bytes: int = QUEUE_BYTES) -> None:
        self._target, self._lost_line, self._queue_bytes = target, lost_line, queue_bytes
        self._lines: list[Line] = []
        self._size = self._taken = self._done = 0
        self._hurry = self._stalled = self._closed = self._torn = False
        self.lost = 0  # lines that no line has told of
        # reentrant: a collected object or a signal may log while a line is being queued
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def put(self, line: Line, prompt: bool = False) -> None:
        """Queue one line with its newline. A `prompt` one has been written when this returns, unless writing stalls."""
        size = len(line) if isinstance(line, bytes) else UNMADE_BYTES
        with self._lock:  # by itself: the condition's own way to it is twice as long
            if self._size + size > self._queue_bytes:
                self.lost += 1
                return
            self._lines.append(line)
            self._size += size
            self._taken += 1
            if prompt or len(self._lines) == 1:
                self._hurry = self._hurry or prompt
                self._changed.notify_all()
            if self._closed and not self._thread.is_alive():
                self._drain()
            elif prompt and not self._stalled:  # in a stall only the first one waits, in vain
                wanted = self._taken
                self._stalled = not self._changed.wait_for(lambda: self._done >= wanted, PROMPT_S)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what is queued, for at most `timeout_s` seconds. Later lines are written by whoever logs them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not (self._closed and not self._lines):
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closed)
                self._changed.wait_for(lambda: self._hurry or self._closed, COLLECT_S)
                self._hurry = False
            self._drain()

    def _drain(self) -> None:
        with self._changed:
            lines, self._lines, self._size = self._lines, [], 0
        failed = sum(self._write(data) for data in _packed(lines, self._target.unit_bytes))
        with self._changed:
            self.lost += failed
            self._done += len(lines)
            self._stalled = False
            self._changed.notify_all()
            lost = self.lost
        if lost and not failed and not self._write(self._lost_line(lost)):
            with self._changed:
                self.lost -= lost

    def _write(self, data: bytes) -> int:
        """How many of these lines could not be written."""
        left = b"\n" + data if self._torn else data
        try:
            while left:
                written = self._target.write(left)
                self._torn, left = left[written - 1 : written] != b"\n", left[written:]
        except OSError:  # a full disk: it is counted, and told of as soon as there is room
            return min(left.count(b"\n"), data.count(b"\n"))  # the newline after a torn line is nobody's
        return 0


def _packed(lines: list[Line], unit_bytes: int) -> Iterator[bytes]:
    """Whole lines together, as many as stay within a write's unit."""
    unit: list[bytes] = []
    size = 0
    for line in lines:
        data = line if isinstance(line, bytes) else line()
        if size and size + len(data) > unit_bytes:
            yield b"".join(unit)
            unit, size = [], 0
        unit.append(data)
        size += len(data)
    if size:
        yield b"".join(unit)
