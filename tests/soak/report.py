"""What a soak has shown, for people and for programs."""

from __future__ import annotations

import json
from collections import Counter

from rich import box
from rich.table import Table

from .engine import Progress, Report

BYTES = {"memory", "bytes", "used"}


def _shown(what: str, value: float) -> str:
    return f"{value / (1 << 20):,.2f} MiB" if what in BYTES else f"{value:,.0f}"


def moment(now: Progress) -> Table:
    """What every process holds now."""
    table = Table(title=f"{now.requests:,} requests, {now.wrong} wrong answers", title_justify="left")
    for heading in ("process", "memory", "files", "sockets", "threads"):
        table.add_column(heading, justify="left" if heading == "process" else "right")
    for who in dict.fromkeys(who for who, what in now.sample if what == "memory"):
        table.add_row(who, *(_shown(what, now.sample[who, what]) for what in ("memory", "files", "sockets", "threads")))
    others = {
        (who, what): value
        for (who, what), value in now.sample.items()
        if who == "shm" or what in ("used", "keys", "expiring")
    }
    table.caption = ", ".join(f"{who} {what} {_shown(what, value)}" for (who, what), value in others.items())
    return table


def table(report: Report) -> Table:
    """Every figure with its median after the warm-up and at the end, its growth in 10,000 requests and the verdict."""
    rows = Table(title=f"{report.requests:,} requests in {report.seconds:,.0f} s", box=box.SIMPLE_HEAD, padding=0)
    for heading in ("of", "what", "warm", "end", "peak", "per 10,000", "bound", ""):
        rows.add_column(heading, justify="left" if heading in ("of", "what", "") else "right", no_wrap=True)
    for (who, what), found in report.findings.items():
        shown = (_shown(what, value) for value in (found.begin, found.end, found.peak, found.slope, found.bound.slope))
        rows.add_row(who, what, *shown, "flat" if found.flat else "[bold red]grows")
    each = ", ".join(f"{name} {size / max(1, report.requests):,.0f}" for name, size in report.written.items() if size)
    rows.caption = f"written to disk a request: {each} bytes"
    return rows


def line(report: Report, control: bool | None = None) -> str:
    """The same as one line of JSON: bytes and counts, slopes in 10,000 requests. `control`: whether the leaks of the
    negative control were found, None where it was not run.
    """
    kinds = sorted({kind for kind, _ in report.outcomes})
    ended: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    for (kind, how), count in report.outcomes.items():
        ended[kind][how] += count
    found = {
        f"{who} {what}": {
            "begin": finding.begin, "end": finding.end, "peak": finding.peak, "slope": round(finding.slope, 1),
            "bound": finding.bound.slope, "flat": finding.flat,
        }
        for (who, what), finding in report.findings.items()
    }  # fmt: skip
    return json.dumps(
        {
            "flat": not report.problems, "control": control, "seconds": round(report.seconds, 1),
            "requests": report.requests, "problems": report.problems, "figures": found, "outcomes": ended,
            "written_bytes": dict(report.written),
        }
    )  # fmt: skip
