"""How `truthgpt audit` shows what it has found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from orchestrator.ops.auditcheck import Report

_LONG_BYTES = 16 << 20  # a log that takes long enough to show a bar


@contextmanager
def reading(folder: Path) -> Iterator[Callable[[int], None]]:
    """Takes how many bytes were read; on a terminal, and for a long log, it shows how far that is."""
    total = sum(path.stat().st_size for path in folder.glob("audit*.jsonl"))
    if total < _LONG_BYTES or not sys.stderr.isatty():
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task, behind = bar.add_task("", total=total), 0

        def progress(size: int) -> None:
            nonlocal behind
            behind += size
            if behind > 1 << 20:
                bar.advance(task, behind)
                behind = 0

        yield progress


def shown(row: dict[str, Any]) -> str:
    """One event for people. The log is ASCII with escapes; what those stand for is shown only where it is printable."""
    rest = {name: value for name, value in row.items() if name not in ("seq", "time", "event", "prev", "hash")}
    text = f"{row['seq']} {row['time']} {row['event']}" + "".join(f" {name}={_value(rest[name])}" for name in rest)
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}:{_value(part)}" for name, part in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def document(report: Report) -> dict[str, Any]:
    broken = report.broken
    where = None if broken is None else {"file": str(broken.file), "line": broken.line or None, "why": broken.why}
    return {
        "ok": broken is None, "broken": where, "files": report.files, "lines": report.lines, "first": report.first,
        "last": asdict(report.last), "head": None if report.head is None else asdict(report.head),
        "base": None if report.base is None or not report.base.seq else asdict(report.base),
        "torn_bytes": report.torn_bytes, "recovered": report.recovered, "lost": report.lost,
        "unfinished": report.unfinished, "running": report.running,
    }  # fmt: skip


def tell(report: Report) -> None:
    if report.broken is not None:
        click.echo(f"BROKEN at {report.broken.place}: {report.broken.why}")
    span = f", {report.first} to {report.last.seq}" if report.lines else ""
    files = f"{report.files} {'file' if report.files == 1 else 'files'}"
    click.echo(f"{'ok' if report.broken is None else 'good before it'}: {report.lines} lines{span}, in {files}")
    if report.base is not None and report.base.seq:
        click.echo(f"note: lines up to {report.base.seq} were removed by retention")
    gone = max(0, report.unfinished - report.running)
    for number, what in (
        (report.torn_bytes, "bytes at the end are a line that is being written, or that its writer could not finish"),
        (report.recovered, "times a writer found an end that was not as it was left, and said so"),
        (report.lost, "events could not be written, and were counted"),
        (gone, "processes ended without saying so: what they had not yet written, of at most 0.1 s, is lost"),
    ):
        if number:
            click.echo(f"note: {number} {what}")
    if report.broken is None and report.lines:
        click.echo(f"mark: {report.last.seq}:{report.last.hash}")
