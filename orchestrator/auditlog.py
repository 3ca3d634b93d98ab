"""The audit log's form: lines in one hash chain over all processes and files. auditwriter.py writes it.

    home/audit/audit.jsonl          the newest lines
    home/audit/audit-<seq>.jsonl    older ones; <seq> is the number of the file's first line
    home/audit/head                 number and hash of the last line known to be on the disk; also the writers' lock
    home/audit/base                 the same of the last line that was removed for its age (ops/auditretention.py)

A line is one JSON object: `seq` (from 1 on), `prev` (the hash of the line before, zeros for the first), `event`, `time`
(RFC 3339, UTC), what belongs to the event, and last `hash`, the keyed hash of the line up to the comma in front of it
(fingerprint.py). Who has no key can change no line, take none out, put none in and exchange none without breaking the
chain.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from orchestrator.fingerprint import HASH_DIGITS, Fingerprint

FOLDER = "audit"
CURRENT = "audit.jsonl"
HEAD = "head"
BASE = "base"
NOTHING = "0" * HASH_DIGITS  # the hash before the first line
LINE_BYTES = 16 << 10  # that a line has at most

_ROTATED = re.compile(r"audit-(\d{12,})\.jsonl")
_START = re.compile(rb'\{"seq":([1-9]\d{0,18}),"prev":"([0-9a-f]{32})","event":"([a-z]+)"')
_END = re.compile(rb',"hash":"([0-9a-f]{32})"\}\n')
END_BYTES = len(',"hash":""}\n') + HASH_DIGITS
_HEAD = re.compile(r"(\d{20}) ([0-9a-f]{32}) ([0-9a-f]{32})\n")
_encode = json.JSONEncoder(separators=(",", ":")).encode


class AuditLogError(Exception):
    """The log is not one that may be written or read; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Mark:
    """A place in the chain: a line's number and hash; 0 and zeros before the first line."""

    seq: int = 0
    hash: str = NOTHING


@dataclass(frozen=True, slots=True)
class Line:
    """What the chain needs to know of a line that is shaped as ours are. `hash` is what it claims."""

    seq: int
    prev: str
    event: str
    hash: str


def parse(line: bytes) -> Line | None:
    """A line with its end, or None where this is none of ours."""
    start, end = _START.match(line), _END.fullmatch(line[-END_BYTES:])
    if start is None or end is None:
        return None
    return Line(int(start[1]), start[2].decode(), start[3].decode(), end[1].decode())


def genuine(line: bytes, found: Line, prints: Fingerprint) -> bool:
    """Whether the line's hash is that of this key."""
    return prints.chain(line[:-END_BYTES]) == found.hash


def encode(event: str, at: float, fields: Mapping[str, object]) -> bytes:
    """An event as the middle of a line, without its place in the chain. What is None, empty or false is left out.

    `at` is Unix time in seconds. It is ASCII: nothing in it can move a terminal's cursor.
    """
    kept = {name: value for name, value in fields.items() if value or value == 0 and value is not False}
    return f'"event":"{event}","time":"{stamp(at)}",{_encode(kept)[1:-1]}'.rstrip(",").encode()


def chained(event: bytes, last: Mark, prints: Fingerprint) -> tuple[bytes, Mark]:
    """The line of an event that follows `last`, and its mark."""
    text = b'{"seq":%d,"prev":"%s",%s' % (last.seq + 1, last.hash.encode(), event)
    hash = prints.chain(text)
    return text + b',"hash":"%s"}\n' % hash.encode(), Mark(last.seq + 1, hash)


def stamp(at: float) -> str:
    """RFC 3339 in UTC, to the millisecond."""
    milliseconds = int(at * 1000)
    return f"{_second(milliseconds // 1000)}.{milliseconds % 1000:03d}Z"


@lru_cache(maxsize=64)
def _second(at: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))


def folder_of(home: Path) -> Path:
    return home / FOLDER


def rotated(folder: Path) -> list[Path]:
    """The files before the current one, oldest first. Raises OSError."""
    names = [name for name in os.listdir(folder) if _ROTATED.fullmatch(name)] if folder.is_dir() else []
    return [folder / name for name in sorted(names, key=lambda name: (len(name), name))]


def rotated_name(first: int) -> str:
    """The name of a file that begins with this line."""
    return f"audit-{first:012d}.jsonl"


def read_head(folder: Path, prints: Fingerprint) -> Mark | None:
    """What `head` says; None where it is missing or not genuine. Raises OSError."""
    return _read_mark(folder, HEAD, prints)


def read_base(folder: Path, prints: Fingerprint) -> Mark | None:
    """What `base` says: the chain goes on behind this line. None where it is missing or not genuine. Raises OSError."""
    return _read_mark(folder, BASE, prints)


def _read_mark(folder: Path, name: str, prints: Fingerprint) -> Mark | None:
    try:
        text = (folder / name).read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None
    found = _HEAD.fullmatch(text)
    mark = None if found is None else Mark(int(found[1]), found[2])
    return mark if mark is not None and mark_text(mark, prints, name) == text else None


def mark_text(mark: Mark, prints: Fingerprint, name: str = HEAD) -> str:
    """What `head` or `base` holds: always as many characters."""
    return f"{mark.seq:020d} {mark.hash} {prints.chain(f'{name} {mark.seq} {mark.hash}'.encode())}\n"


def end_of_lines(fd: int) -> int:
    """Where in a file the last complete line ends. Raises OSError."""
    end = os.fstat(fd).st_size
    while end:
        begin = max(0, end - LINE_BYTES)
        newline = os.pread(fd, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


def first_line(fd: int) -> bytes:
    """Raises OSError."""
    return os.pread(fd, LINE_BYTES, 0).partition(b"\n")[0] + b"\n"


def last_line(fd: int, size: int) -> bytes:
    """The last of the lines that make up the first `size` bytes; empty where there is none. Raises OSError."""
    begin = max(0, size - LINE_BYTES)
    text = os.pread(fd, size - begin, begin)
    return text[text.rfind(b"\n", 0, -1) + 1 :] if text else b""


def last_mark(fd: int, size: int, folder: Path, prints: Fingerprint) -> Mark | None:
    """The last line of the current file, else of the newest before it; None where there is none, or no genuine one."""
    text = last_line(fd, size)
    if not text and (older := rotated(folder)):
        with older[-1].open("rb") as file:
            text = last_line(file.fileno(), end_of_lines(file.fileno()))
    found = parse(text)
    return Mark(found.seq, found.hash) if found is not None and genuine(text, found, prints) else None


def check_key(folder: Path, prints: Fingerprint) -> None:
    """Raise AuditLogError where the log that is there was written with another key, OSError where it cannot be read."""
    try:
        fd = os.open(folder / CURRENT, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = end_of_lines(fd)
        if not size and not rotated(folder):
            return
        if read_head(folder, prints) is None and last_mark(fd, size, folder, prints) is None:
            raise AuditLogError(
                f"the lines in {folder} were written with another audit key",
                f"give the key that they were written with, or move {folder} away to begin a new log",
            )
    finally:
        os.close(fd)
