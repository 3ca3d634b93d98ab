"""What the gateway's parent knows of its workers' series, and how Prometheus reads it.

Each worker says once a second all that it has counted; the last word of each is kept. So a scrape asks nobody and waits
for nobody. Counters and histograms are summed over the workers, those that have ended included: no total goes back
while the parent lives (it lacks at most the last second of a worker that was killed). Gauges are those of the workers
that have been heard of lately.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.utils import floatToGoString

from orchestrator.metrics import Labels, Snapshot
from orchestrator.metrics_table import TABLE, Series

log = logging.getLogger(__name__)

STALE_S = 3.0  # a worker that has said nothing for so long has no gauges
RATE_S = 300.0  # what truthgpt_error_rate looks back on
OPENMETRICS_TYPE = "application/openmetrics-text"

Value = float | list[float]  # of a histogram: each bucket's own count, the count above all of them, the sum
Totals = dict[str, dict[Labels, Value]]


def parse(line: bytes) -> Totals:
    """A worker's snapshot. Raises ValueError for what is none.

    What another version of the program has, whose worker this one may have started, is passed over.
    """
    try:
        return _totals(json.loads(line))
    except (AttributeError, TypeError, IndexError, KeyError) as error:
        raise ValueError("this is no snapshot of metrics") from error


def _totals(said: Mapping[str, Any]) -> Totals:
    return {
        name: {tuple(row[:-1]): row[-1] for row in rows if _fits(TABLE[name], row)}
        for name, rows in said.items()
        if name in TABLE
    }


def _fits(series: Series, row: list[Any]) -> bool:
    value = row[-1]
    cells = len(value) if isinstance(value, list) else 0
    return len(row) == len(series.labels) + 1 and cells == (len(series.buckets) + 2 if series.buckets else 0)


def merge(into: Totals, said: Totals, kinds: Iterable[str]) -> None:
    """Add what one process said of the series of these kinds."""
    for name, values in said.items():
        series = TABLE[name]
        if series.kind not in kinds:
            continue
        known = into.setdefault(name, {})
        for labels, value in values.items():
            before = known.get(labels)
            known[labels] = value if before is None else _together(series, before, value)


def _together(series: Series, one: Value, other: Value) -> Value:
    if isinstance(one, list) and isinstance(other, list):
        return [a + b for a, b in zip(one, other, strict=True)]
    if isinstance(one, list) or isinstance(other, list):
        raise TypeError(f"{series.name} is either a histogram or it is none")
    return max(one, other) if series.merge == "max" else min(one, other) if series.merge == "min" else one + other


@dataclass
class _Worker:
    pid: int
    said: Totals
    heard_at: float | None = None


class Scrape:
    """The series of `expected` workers and of the parent itself, whose own are what `own` returns."""

    def __init__(self, expected: int, own: Callable[[], Snapshot], clock: Callable[[], float] = time.monotonic) -> None:
        self._expected, self._own, self._clock = expected, own, clock
        self._workers: dict[int, _Worker] = {}
        self._started: set[int] = set()
        self._restarts = 0
        self._past: Totals = {}  # what those have counted that have ended
        self._seen: deque[tuple[float, float, float]] = deque()  # when, requests until then, errors among them

    def started(self, number: int, pid: int) -> None:
        """A worker's process was started."""
        self._restarts += number in self._started
        self._started.add(number)
        self._workers[number] = _Worker(pid, {})

    def heard(self, number: int, line: bytes) -> None:
        """A worker said its snapshot."""
        try:
            said = parse(line)
        except ValueError as error:
            log.warning("worker %d: %s", number, error)
            return
        if number in self._workers:
            worker = self._workers[number]
            worker.said, worker.heard_at = said, self._clock()

    def ended(self, number: int) -> None:
        """A worker's process is gone: what it had counted stays counted."""
        merge(self._past, self._workers.pop(number).said, ("counter", "histogram"))

    def tick(self) -> None:
        """To be called about once a second: the error rate needs to know how it was."""
        now = self._clock()
        self._seen.append((now, *self._requests()))
        while self._seen[0][0] < now - RATE_S:
            self._seen.popleft()

    def totals(self) -> Totals:
        """All series as they are now."""
        now, all_kinds = self._clock(), ("counter", "histogram", "gauge")
        totals: Totals = {}
        merge(totals, self._past, all_kinds)
        merge(totals, _totals(self._own()), all_kinds)
        for worker in self._workers.values():
            fresh = self._fresh(worker, now)
            merge(totals, worker.said, all_kinds if fresh else ("counter", "histogram"))
        up = sum(self._fresh(worker, now) for worker in self._workers.values())
        silent = sum(worker.heard_at is not None for worker in self._workers.values()) - up
        states = {"up": up, "silent": silent, "down": max(0, self._expected - up - silent)}
        pids = [os.getpid(), *(worker.pid for worker in self._workers.values())]
        totals["truthgpt_workers"] = {(state,): float(count) for state, count in states.items()}
        totals["truthgpt_worker_restarts_total"] = {(): float(self._restarts)}
        totals["truthgpt_memory_usage_bytes"] = {(): float(sum(map(resident_bytes, pids)))}
        totals["truthgpt_error_rate"] = {(): self._error_rate()}
        return totals

    def text(self, accept: str) -> tuple[bytes, str]:
        """What Prometheus reads, and its media type: OpenMetrics 1.0 where Accept names it, else the text format."""
        families = _Families(self.totals())
        if OPENMETRICS_TYPE in accept:
            text: bytes = openmetrics.generate_latest(families)  # type: ignore[no-untyped-call]
            return text, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(families), CONTENT_TYPE_PLAIN_0_0_4

    def _fresh(self, worker: _Worker, now: float) -> bool:
        return worker.heard_at is not None and now - worker.heard_at <= STALE_S

    def _requests(self) -> tuple[float, float]:
        """Requests that have ended, and errors among them."""
        all_of_them = errors = 0.0
        for said in (self._past, *(worker.said for worker in self._workers.values())):
            for (_, _, outcome), count in said.get("truthgpt_requests_total", {}).items():
                if isinstance(count, (int, float)):
                    all_of_them += count
                    errors += count if outcome == "error" else 0
        return all_of_them, errors

    def _error_rate(self) -> float:
        requests, errors = self._requests()
        _, requests_then, errors_then = self._seen[0] if self._seen else (0.0, 0.0, 0.0)
        return (errors - errors_then) / max(1.0, requests - requests_then)


class _Families:
    """prometheus_client's view of the totals."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        for name, series in TABLE.items():
            yield _family(series, self._totals.get(name, {}))


def _family(series: Series, values: Mapping[Labels, Value]) -> Metric:
    if series.kind == "histogram":
        histogram = HistogramMetricFamily(series.name, series.help, labels=series.labels)
        bounds = [*map(floatToGoString, series.buckets), "+Inf"]
        for labels, cells in values.items():
            if isinstance(cells, list):
                buckets = list(zip(bounds, accumulate(cells[:-1]), strict=True))
                histogram.add_metric(labels, buckets, sum_value=cells[-1])
        return histogram
    kind = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
    family = kind(series.name, series.help, labels=series.labels)
    for labels, value in values.items():
        if not isinstance(value, list):
            family.add_metric(labels, value)
    return family


def build_info() -> Mapping[Labels, float]:
    return {(importlib.metadata.version("truthgpt"), platform.python_version()): 1.0}


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, pages that it shares with others included (proc(5)); 0 when it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
