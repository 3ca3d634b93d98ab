"""The metric history as people look at it: its lines put together into steps of time, and as a table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

STEPS_S = (60, 300, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400, 604_800)
ROWS = 24  # as many steps are shown as fit on a screen
_BARS = "▁▂▃▄▅▆▇█"

# name of the column -> where it is in a line
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "time": ("time",), "instance": ("instance",), "requests": ("requests",), "errors": ("errors",),
    "error_rate": ("error_rate",), "requests_per_s": ("requests_per_s",), "tokens_per_s": ("tokens_per_s",),
    "latency_p50_s": ("latency_s", "p50"), "latency_p95_s": ("latency_s", "p95"), "latency_p99_s": ("latency_s", "p99"),
    "ttft_p95_s": ("ttft_s", "p95"), "in_flight": ("in_flight",), "active_users": ("active_users",),
    "cache_hit_rate": ("cache", "hit_rate"), "memory_used_bytes": ("memory", "used_bytes"),
    "memory_total_bytes": ("memory", "total_bytes"), "gateway_memory_bytes": ("memory", "gateway_bytes"),
    "triton_up": ("triton_up",), "redis_up": ("redis_up",), "alerts_firing": ("alerts", "firing"),
}  # fmt: skip


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1

    @property
    def value(self) -> float:
        return self.total / self.count


@dataclass
class _Instance:
    """What one process wrote in a step."""

    requests: _Mean = field(default_factory=_Mean)
    errors: _Mean = field(default_factory=_Mean)
    judged: _Mean = field(default_factory=_Mean)  # the requests of those lines that say how many failed
    tokens: _Mean = field(default_factory=_Mean)


@dataclass(frozen=True)
class Step:
    """A stretch of time from `at` (Unix time) on. Rates are a second's, over all processes; None: nobody could tell.

    `errors` is the part of the requests that failed, `p95_s` the slowest 95th percentile of the latency that was
    written, `memory` the largest part of the memory that was in use.
    """

    at: float
    requests_per_s: float | None
    errors: float | None
    p95_s: float | None
    tokens_per_s: float | None
    memory: float | None


def step_for(duration_s: float) -> int:
    """The step, in seconds, that shows this much time on one screen."""
    return next((step for step in STEPS_S if duration_s <= step * ROWS), STEPS_S[-1])


def steps(rows: Iterable[Mapping[str, Any]], step_s: int) -> list[Step]:
    """Lines by steps that begin at whole multiples of `step_s`, in their order; a step without lines is left out.

    Each line tells of the minutes before it (`window_s`), so a rate is the mean of its lines', summed over processes.
    """
    instances: dict[float, dict[str, _Instance]] = {}
    p95: dict[float, float] = {}
    memory: dict[float, float] = {}
    for row in rows:
        at = _moment(row)
        if at is None:
            continue
        at -= at % step_s
        one = instances.setdefault(at, {}).setdefault(str(row.get("instance")), _Instance())
        rate, failed = number(row, "requests_per_s"), number(row, "error_rate")
        if rate is not None:
            one.requests.add(rate)
            if failed is not None:
                one.errors.add(failed * rate)
                one.judged.add(rate)
        if (tokens := number(row, "tokens_per_s")) is not None:
            one.tokens.add(tokens)
        if (slow := number(row, "latency_s", "p95")) is not None:
            p95[at] = max(slow, p95.get(at, 0.0))
        used, total = number(row, "memory", "used_bytes"), number(row, "memory", "total_bytes")
        if used is not None and total:
            memory[at] = max(used / total, memory.get(at, 0.0))
    return [_step(at, [*found.values()], p95.get(at), memory.get(at)) for at, found in sorted(instances.items())]


def _step(at: float, found: list[_Instance], p95_s: float | None, memory: float | None) -> Step:
    requests, tokens = _sum(one.requests for one in found), _sum(one.tokens for one in found)
    failed, judged = _sum(one.errors for one in found), _sum(one.judged for one in found)
    errors = failed / judged if failed is not None and judged else None
    return Step(at, requests, errors, p95_s, tokens, memory)


def _sum(means: Iterable[_Mean]) -> float | None:
    known = [mean.value for mean in means if mean.count]
    return sum(known) if known else None


def number(row: Mapping[str, Any], *path: str) -> float | None:
    """The number at this place of a line; None where there is none."""
    found = _at(row, path)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return None
    try:
        return float(found) if math.isfinite(found) else None
    except OverflowError:
        return None


def table(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """CSV: a header, then a row a line with COLUMNS; what nobody can tell is empty."""
    yield _csv(COLUMNS)
    for row in rows:
        yield _csv(_cell(_at(row, path)) for path in COLUMNS.values())


def sparkline(values: Iterable[float | None]) -> str:
    """A character for each value, from nothing to the largest; a blank where nobody could tell."""
    known = [*values]
    top = max((value for value in known if value is not None), default=0.0)
    return "".join(
        " " if value is None else _BARS[min(7, int(value / top * 8))] if top > 0 and value > 0 else _BARS[0]
        for value in known
    )


def _at(row: Mapping[str, Any], path: Iterable[str]) -> object:
    found: object = row
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    # a spreadsheet runs what begins like a formula
    return "" if not isinstance(value, str) else f"'{value}" if value[:1] in "=+-@\t\r" else value


def _csv(cells: Iterable[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _moment(row: Mapping[str, Any]) -> float | None:
    try:
        found = datetime.fromisoformat(str(row["time"]))
    except (KeyError, ValueError):
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
