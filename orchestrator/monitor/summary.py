"""The main figures of a deployment, now and over the last minutes: one document for people, alerts and history.

Counters and histograms of the scrape are remembered every few seconds, a few dozen numbers each time; a window is the
difference between now and then. Quantiles are interpolated in their bucket, as Prometheus does it.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any

from orchestrator.metrics_table import TABLE
from orchestrator.scrape import Totals, Value

TICK_S = 5.0
WINDOW_S = 300.0
QUANTILES = (0.5, 0.95, 0.99)
BREAKERS = {0.0: "closed", 1.0: "half_open", 2.0: "open"}

_LATENCY, _TTFT = "truthgpt_request_duration_seconds", "truthgpt_time_to_first_token_seconds"

Part = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class _Counted:
    """What had been counted at `at` (monotonic seconds)."""

    at: float
    outcomes: Mapping[str, float]
    tokens: float  # generated ones
    cache: Mapping[str, float]
    latency: Sequence[float]  # of requests that ended well: each bucket's count, and the count above all of them
    ttft: Sequence[float]


class Summary:
    """`totals` are the scrape's."""

    def __init__(
        self, totals: Callable[[], Totals], clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._totals, self._clock, self._wall = totals, clock, wall
        self._parts: list[Part] = []
        self._past = deque([_counted({}, clock())])  # a process begins with nothing

    def add(self, part: Part) -> None:
        """Have what somebody else knows in the document, by the names of the figures."""
        self._parts.append(part)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        """Remember what has been counted until now."""
        now = self._clock()
        self._past.append(_counted(self._totals(), now))
        # one that is older than the window is needed: the window begins with it
        while len(self._past) > 1 and self._past[1].at <= now - WINDOW_S:
            self._past.popleft()

    def figures(self, window_s: float = WINDOW_S) -> dict[str, Any]:
        """The document; `window_s` in it is the time that its rates are really of. What nobody can tell is None."""
        totals = self._totals()
        document = {"time": _rfc3339(self._wall()), **self._window(totals, window_s), **_gauges(totals)}
        for part in self._parts:
            for name, value in part().items():
                known = document.get(name)
                document[name] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
        return document

    def minute(self) -> dict[str, Any]:
        """The rates and latencies of the last minute alone."""
        return self._window(self._totals(), 60.0)

    def _window(self, totals: Totals, window_s: float) -> dict[str, Any]:
        now = self._clock()
        times = [each.at for each in self._past]
        before = self._past[max(0, bisect_left(times, now - window_s + TICK_S / 2) - 1)]
        return _rates(before, _counted(totals, now))


def _counted(totals: Totals, at: float) -> _Counted:
    return _Counted(
        at,
        outcomes=_by(totals, "truthgpt_requests_total", 2),
        tokens=_by(totals, "truthgpt_tokens_total", 1).get("completion", 0.0),
        cache=_by(totals, "truthgpt_cache_requests_total", 1),
        latency=_cells(totals, _LATENCY, lambda labels: labels[2] == "ok"),
        ttft=_cells(totals, _TTFT, lambda labels: True),
    )


def _by(totals: Totals, name: str, label: int) -> dict[str, float]:
    """A counter, summed up by one of its labels."""
    found: dict[str, float] = {}
    for labels, value in totals.get(name, {}).items():
        found[labels[label]] = found.get(labels[label], 0.0) + _number(value)
    return found


def _cells(totals: Totals, name: str, wanted: Callable[[tuple[str, ...]], bool]) -> list[float]:
    """A histogram's buckets, summed up over the wanted labels."""
    cells = [0.0] * (len(TABLE[name].buckets) + 1)
    for labels, value in totals.get(name, {}).items():
        if isinstance(value, list) and wanted(labels):
            cells = [one + other for one, other in zip(cells, value[:-1], strict=True)]
    return cells


def _rates(before: _Counted, after: _Counted) -> dict[str, Any]:
    window_s = max(0.001, after.at - before.at)
    outcomes = {name: after.outcomes.get(name, 0.0) - before.outcomes.get(name, 0.0) for name in after.outcomes}
    requests, errors = sum(outcomes.values()), outcomes.get("error", 0.0)
    hits, misses = (after.cache.get(what, 0.0) - before.cache.get(what, 0.0) for what in ("hit", "miss"))
    return {
        "window_s": round(window_s, 1),
        "requests": int(requests),
        "errors": int(errors),
        "refused": int(outcomes.get("refused", 0.0)),
        "cancelled": int(outcomes.get("cancelled", 0.0)),
        "error_rate": round(errors / requests, 4) if requests else 0.0,
        "requests_per_s": round(requests / window_s, 3),
        "tokens_per_s": round((after.tokens - before.tokens) / window_s, 2),
        "latency_s": _quantiles(TABLE[_LATENCY].buckets, before.latency, after.latency),
        "ttft_s": _quantiles(TABLE[_TTFT].buckets, before.ttft, after.ttft),
        "cache": {
            "hits": int(hits), "misses": int(misses),
            "hit_rate": round(hits / (hits + misses), 4) if hits + misses else 0.0,
        },
    }  # fmt: skip


def _quantiles(
    bounds: Sequence[float], before: Sequence[float], after: Sequence[float]
) -> dict[str, float | None]:
    cells = [now - then for now, then in zip(after, before, strict=True)]
    return {f"p{share * 100:.0f}": quantile(bounds, cells, share) for share in QUANTILES}


def quantile(bounds: Sequence[float], cells: Sequence[float], share: float) -> float | None:
    """The value below which this share of the observations lies; None where there is none.

    `cells` are the counts of the buckets that end at `bounds`, and last of those above all of them, which are taken for
    the last bound.
    """
    counts = list(accumulate(cells))
    if not counts or counts[-1] <= 0:
        return None
    rank = share * counts[-1]
    index = bisect_left(counts, rank)
    if index >= len(bounds):
        return bounds[-1]
    below, low = (counts[index - 1], bounds[index - 1]) if index else (0.0, 0.0)
    inside = cells[index]
    return round(low + (bounds[index] - low) * ((rank - below) / inside if inside else 0.0), 6)


def _gauges(totals: Totals) -> dict[str, Any]:
    workers = {state: int(_number(value)) for (state,), value in totals.get("truthgpt_workers", {}).items()}
    return {
        "in_flight": int(_one(totals, "truthgpt_in_flight") or 0),
        "active_users": None,
        "workers": {state: workers.get(state, 0) for state in ("up", "silent", "down")},
        "worker_restarts": int(_one(totals, "truthgpt_worker_restarts_total") or 0),
        "memory": {"gateway_bytes": _whole(_one(totals, "truthgpt_memory_usage_bytes"))},
        "triton_up": _flag(_one(totals, "truthgpt_triton_up")),
        "redis_up": _flag(_one(totals, "truthgpt_redis_up")),
        "limits_degraded": _flag(_one(totals, "truthgpt_limit_degraded")),
        "audit_up": _flag(_one(totals, "truthgpt_audit_up")),
        "models": _models(totals) if workers.get("up") else None,
    }


def _models(totals: Totals) -> list[dict[str, Any]]:
    def of(name: str, *labels: str) -> float | None:
        value = totals.get(name, {}).get(labels)
        return None if value is None else _number(value)

    return [
        {
            "name": model,
            "ready": _flag(of("truthgpt_model_ready", model)),
            "breaker": BREAKERS.get(of("truthgpt_breaker_state", model) or 0.0, "closed"),
            "fallback": _flag(of("truthgpt_model_fallback", model)),
            "running": _whole(of("truthgpt_model_requests", model, "running")),
            "waiting": _whole(of("truthgpt_model_requests", model, "waiting")),
        }
        for (model,) in sorted(totals.get("truthgpt_model_ready", {}))
    ]


def _one(totals: Totals, name: str) -> float | None:
    value = totals.get(name, {}).get(())
    return None if value is None else _number(value)


def _number(value: Value) -> float:
    return 0.0 if isinstance(value, list) else float(value)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _flag(value: float | None) -> bool | None:
    return None if value is None else value > 0


def _rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
