"""Reading the audit log: its end, what it says on the whole, and a copy of a part. Nothing is checked here."""

from __future__ import annotations

import csv
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from orchestrator.auditlog import CURRENT, LINE_BYTES, parse, rotated, stamp
from orchestrator.keys import parse_duration
from orchestrator.ops.auditing import opened

LOOK_S = 0.2
COLUMNS = (
    "seq", "time", "event", "id", "caller", "tenant", "operation", "edge", "route", "model", "task", "stream",
    "outcome", "error", "kind", "finish_reason", "cache", "fallback", "sanitized", "refused", "shadow", "degraded",
    "input_hash", "prompt_tokens", "completion_tokens", "output_chars", "duration_s", "ttft_s", "address", "subject",
    "detail", "traceparent", "pid", "only_counted", "seconds", "requests", "errors", "cancelled", "tokens_per_s",
    "duration_quantiles_s", "ttft_quantiles_s", "count", "since", "lost", "cut_bytes", "missing", "head_missing",
    "last_line_spoilt", "prev", "hash",
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """Which lines: of these events (none: of all), from `since` on and before `until`, as `stamp` writes times."""

    events: Collection[str] = ()
    since: str = ""
    until: str = ""

    def row(self, line: bytes) -> dict[str, Any] | None:
        """The line's fields; None where it is not wanted, or is none of ours."""
        found = parse(line)
        if found is None or (self.events and found.event not in self.events):
            return None
        row: dict[str, Any] = json.loads(line)
        at = str(row.get("time", ""))
        return row if at >= self.since and not (self.until and at >= self.until) else None


def when(text: str, now: float) -> str:
    """A moment as the log writes it: of a date, a time (RFC 3339, UTC where it names no zone), or `24h` ago.

    Raises ValueError.
    """
    try:
        return stamp(now - parse_duration(text))
    except ValueError:
        found = datetime.fromisoformat(text)
    return stamp((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())


def lines(folder: Path, progress: Callable[[int], None] = lambda size: None) -> Iterator[bytes]:
    """Every line that is there now, oldest first. Raises NoAuditLog and OSError."""
    files = opened(folder)
    try:
        for _, file, size in files:
            while size > 0 and (line := file.readline(min(LINE_BYTES, size))):
                size -= len(line)
                progress(len(line))
                yield line
    finally:
        for _, file, _ in files:
            file.close()


def tail(folder: Path, count: int, wanted: Wanted) -> list[dict[str, Any]]:
    """The last `count` rows that are wanted, oldest first. Raises NoAuditLog and OSError."""
    kept: deque[dict[str, Any]] = deque()
    files = opened(folder)
    try:
        for _, file, _ in reversed(files):
            if len(kept) >= count:
                break
            rows = (row for line in file if (row := wanted.row(line)) is not None)
            kept.extendleft(reversed(deque(rows, maxlen=count - len(kept))))
    finally:
        for _, file, _ in files:
            file.close()
    return list(kept)


def follow(
    folder: Path, after: int, wanted: Wanted, pause: Callable[[float], None] = time.sleep
) -> Iterator[dict[str, Any]]:
    """The wanted rows with a number above `after` as they are written, over rotations; for ever. Raises OSError."""
    while True:
        try:
            file = (folder / CURRENT).open("rb")
        except FileNotFoundError:
            pause(LOOK_S)
            continue
        with file:
            # what was moved aside before this one was opened: its end may not have been read, nor what came after it
            older_files = rotated(folder)
            begun = sum(int(path.stem.removeprefix("audit-")) <= after for path in older_files)
            for path in older_files[max(0, begun - 1) :]:
                with path.open("rb") as older:
                    for line in older:
                        after, row = _newer(line, after, wanted)
                        if row is not None:
                            yield row
            moved = False
            while not moved:
                moved = not _is_current(file, folder)  # asked before reading: a file that was moved grows no more
                while (line := file.readline()).endswith(b"\n"):
                    after, row = _newer(line, after, wanted)
                    if row is not None:
                        yield row
                file.seek(-len(line), os.SEEK_CUR)  # it is being written
                if not moved:
                    pause(LOOK_S)


def _newer(line: bytes, after: int, wanted: Wanted) -> tuple[int, dict[str, Any] | None]:
    found = parse(line)
    if found is None or found.seq <= after:
        return after, None
    return found.seq, wanted.row(line)


def _is_current(file: BinaryIO, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(folder / CURRENT))
    except FileNotFoundError:
        return False


@dataclass
class Stats:
    """Counts of what the log has. `unreadable`: lines that are none of ours."""

    lines: int = 0
    unreadable: int = 0
    first: str = ""
    last: str = ""
    events: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    callers: Counter[str] = field(default_factory=Counter)
    only_counted: int = 0
    lost: int = 0

    def add(self, row: dict[str, Any]) -> None:
        self.lines += 1
        at = str(row.get("time", ""))
        self.first, self.last = min(self.first or at, at), max(self.last, at)
        self.events[row["event"]] += 1
        for counter, name in (
            (self.outcomes, "outcome"), (self.errors, "error"), (self.errors, "kind"), (self.models, "model"),
            (self.callers, "caller"),
        ):  # fmt: skip
            if row.get(name):
                counter[str(row[name])] += 1
        self.only_counted += int(row.get("only_counted", 0))
        self.lost += int(row.get("count", 0)) if row["event"] == "lost" else 0


def stats(folder: Path, wanted: Wanted, progress: Callable[[int], None] = lambda size: None) -> Stats:
    """Raises NoAuditLog and OSError."""
    found = Stats()
    for line in lines(folder, progress):
        row = wanted.row(line)
        if row is not None:
            found.add(row)
        elif line.endswith(b"\n") and parse(line) is None:
            found.unreadable += 1
    return found


def export(folder: Path, wanted: Wanted, form: str, out: TextIO) -> int:
    """Write the wanted lines, as they are or (`form` csv) as a table; how many. Raises NoAuditLog and OSError."""
    table = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    if form == "csv":
        table.writeheader()
    count = 0
    for line in lines(folder):
        row = wanted.row(line)
        if row is None:
            continue
        count += 1
        if form == "csv":
            table.writerow({name: cell(value) for name, value in row.items()})
        else:
            out.write(line.decode("ascii"))
    return count


def cell(value: object) -> object:
    """A value as a spreadsheet may be given it: no text is taken for a formula (OWASP, CSV injection)."""
    if isinstance(value, (list, dict)):
        return json.dumps(value, separators=(",", ":"))
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
