"""Checking the audit log's chain, from its first line to its last."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from orchestrator.auditlog import BASE, CURRENT, HEAD, LINE_BYTES, Line, Mark, genuine, parse, read_base, read_head
from orchestrator.fingerprint import Fingerprint
from orchestrator.local.process import alive
from orchestrator.ops.auditing import opened


class Broken(Exception):
    """The first place where the chain does not hold: a file, a line of it counted from 1 (0: the file), and why."""

    def __init__(self, file: Path, line: int, why: str) -> None:
        super().__init__(why)
        self.file, self.line, self.why = file, line, why

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.line else str(self.file)


@dataclass
class Report:
    """What was checked. `first` and `last` are lines; `torn_bytes` an unfinished line at the end.

    `unfinished`: processes that began to write and have not said that they stopped, `running` those of them that run
    on this machine now. `lost`: events that their writers counted because they could not write them. `base`: the last
    line that retention has removed.
    """

    files: int = 0
    lines: int = 0
    first: int = 0
    last: Mark = field(default_factory=Mark)
    head: Mark | None = None
    base: Mark | None = None
    torn_bytes: int = 0
    recovered: int = 0
    lost: int = 0
    unfinished: int = 0
    running: int = 0
    broken: Broken | None = None


def verify(
    folder: Path, prints: Fingerprint, first: int | None = None, known: Mark | None = None,
    progress: Callable[[int], None] = lambda size: None,
) -> Report:  # fmt: skip
    """Check every line from `first` on, else from the first that retention has left; the chain has to have `known`.

    Constant memory. `progress` is told how many bytes more were read. Raises NoAuditLog and OSError; what is wrong is
    in the report.
    """
    head = read_head(folder, prints)  # before the lines: it is never ahead of them
    files = opened(folder)
    # after the files were opened: what retention has removed meanwhile is still open, and `base` is behind it
    base = read_base(folder, prints) if first is None else None
    check = _Check(prints, first, head, known, base)
    check.report.files = len(files)
    try:
        for index, (path, file, size) in enumerate(files):
            check.file(path, file, size, index == len(files) - 1, progress)
        check.end(folder)
    except Broken as broken:
        check.report.broken = broken
    finally:
        for _, file, _ in files:
            file.close()
    return check.finished()


def follow(path: Path, prints: Fingerprint, last: Mark) -> Mark:
    """Check a whole file that goes on behind `last`; its own last line. Lines up to `last` may be in front.

    Raises Broken and OSError.
    """
    check = _Check(prints, None, None, None, last)
    with path.open("rb") as file:
        check.file(path, file, os.fstat(file.fileno()).st_size, False, lambda size: None)
    return check.report.last if check.report.lines else last


class _Check:
    def __init__(
        self, prints: Fingerprint, first: int | None, head: Mark | None, known: Mark | None, base: Mark | None = None
    ) -> None:
        self.report = Report(head=head, base=base, last=base or Mark())
        self._prints, self._first, self._known = prints, first, known
        self._begins = first if first is not None else self.report.last.seq + 1
        self._writers: dict[int, int] = {}  # pid -> starts without a stop

    def file(self, path: Path, file: BinaryIO, size: int, newest: bool, progress: Callable[[int], None]) -> None:
        number = 0
        for text, number in zip(_lines(file, size), range(1, size + 1), strict=False):
            progress(len(text))
            if not text.endswith(b"\n") and newest and len(text) <= LINE_BYTES:
                self.report.torn_bytes = len(text)
                return
            found = parse(text)
            if found is None:
                raise Broken(path, number, "this is no line of the audit log")
            if not genuine(text, found, self._prints):
                raise Broken(path, number, "the line was changed, or written with another key")
            if found.seq < self._begins and not self.report.lines and (self._first or self.report.base) is not None:
                continue
            self._follows(path, number, found)
            if found.event in ("start", "stop", "recovered", "lost"):
                self._told(path, number, found, json.loads(text))

    def _follows(self, path: Path, number: int, found: Line) -> None:
        report, last = self.report, self.report.last
        if not report.lines:
            if found.seq != self._begins:
                raise Broken(path, number, f"the chain begins with line {found.seq} instead of {self._begins}")
            report.first = found.seq
            last = Mark(found.seq - 1, found.prev if self._first is not None else last.hash)
        if found.seq > last.seq + 1:
            raise Broken(path, number, f"lines {last.seq + 1} to {found.seq - 1} are missing before this one")
        if found.seq != last.seq + 1 or found.prev != last.hash:
            raise Broken(path, number, f"line {found.seq} does not follow line {last.seq}")
        for mark, whose in ((report.head, "head"), (self._known, "the mark that was given")):
            if mark is not None and mark.seq == found.seq and mark.hash != found.hash:
                raise Broken(path, number, f"this is not the line {found.seq} that {whose} knows")
        report.lines += 1
        report.last = Mark(found.seq, found.hash)

    def _told(self, path: Path, number: int, found: Line, fields: dict[str, object]) -> None:
        pid, report = fields.get("pid"), self.report
        if found.event == "recovered":
            report.recovered += 1
            if fields.get("head_missing") and found.seq != self._first:
                raise Broken(path, number, "`head` was gone when this was written: lines before may have been cut off")
        elif found.event == "lost" and isinstance(count := fields.get("count"), int):
            report.lost += count
        elif isinstance(pid, int):
            left = self._writers.pop(pid, 0) + (1 if found.event == "start" else -1)
            if left > 0:
                self._writers[pid] = left

    def end(self, folder: Path) -> None:
        """What only the end can tell."""
        last, head = self.report.last, self.report.head
        if head is None:
            raise Broken(folder / HEAD, 0, "it is missing or was changed: whether lines were cut off cannot be told")
        base = self.report.base
        if base is not None and base.seq and not self.report.lines:  # retention always leaves the end of the chain
            raise Broken(folder / CURRENT, 0, f"no line follows line {base.seq}, the last one that was removed")
        for mark, whose in ((head, "head"), (self._known, "the mark that was given")):
            if mark is not None and base is not None and mark.seq == base.seq and mark.hash != base.hash:
                raise Broken(folder / BASE, 0, f"this is not the line {base.seq} that {whose} knows")
            if mark is not None and mark.seq > last.seq:
                raise Broken(
                    folder / CURRENT, 0, f"lines {last.seq + 1} to {mark.seq}, which {whose} knows, are missing"
                )

    def finished(self) -> Report:
        self.report.unfinished = sum(self._writers.values())
        self.report.running = sum(alive(pid) for pid in self._writers)
        return self.report


def _lines(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The lines of the first `size` bytes; one that is too long comes in pieces."""
    while size > 0 and (text := file.readline(min(LINE_BYTES + 1, size))):
        size -= len(text)
        yield text
