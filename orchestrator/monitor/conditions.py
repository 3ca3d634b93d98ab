"""Which alerts hold, by the figures of the deployment (summary.py) and the thresholds of the settings. Pure.

What nobody can tell (null, or of another shape than promised) neither holds nor does not: it is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from orchestrator.masking import masked
from orchestrator.settings import Settings

SUMMARY_CHARS, LABEL_CHARS = 400, 200
WHOLE_WINDOW_S = 290.0  # of the five minutes of the rates, which are counted in steps of some seconds

Figures = Mapping[str, Any]
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Condition:
    """An alert that holds now. `value` and `threshold` are ratios, counts or seconds, None where there are none."""

    name: str
    labels: Mapping[str, str]
    summary: str
    value: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Assessment:
    """What holds, and of what nobody can tell: (name, labels), with None for labels where it is all of a name.

    `lingering` does not hold, but is likely to again: its alert is resolved later than others.
    """

    holding: list[Condition] = field(default_factory=list)
    unknown: frozenset[tuple[str, Labels | None]] = frozenset()
    lingering: frozenset[tuple[str, Labels]] = frozenset()

    def is_unknown(self, name: str, labels: Mapping[str, str]) -> bool:
        return (name, None) in self.unknown or (name, tuple(sorted(labels.items()))) in self.unknown

    def lingers(self, name: str, labels: Mapping[str, str]) -> bool:
        return (name, tuple(sorted(labels.items()))) in self.lingering


@dataclass(frozen=True)
class _Seen:
    """What one rule says of one thing; `labels` None: of all things that it is about."""

    holds: bool | None
    summary: str = ""
    value: float | None = None
    threshold: float | None = None
    labels: Labels | None = ()
    lingers: bool = False


def conditions(figures: Figures, settings: Settings) -> list[Condition]:
    """What holds now, however long it has."""
    return assess(figures, settings).holding


def assess(figures: Figures, settings: Settings) -> Assessment:
    """What holds and what is unknown. `figures` may lack anything; of `notifications` and `up_s` see watcher.py."""
    holding: dict[tuple[str, Labels], Condition] = {}
    unknown: set[tuple[str, Labels | None]] = set()
    lingering: set[tuple[str, Labels]] = set()
    for name, check in _CHECKS.items():
        for seen in check(figures, settings):
            if seen.holds is None:
                if not _is_off(name, settings):
                    unknown.add((name, seen.labels))
            elif seen.lingers and seen.labels is not None:
                lingering.add((name, seen.labels))
            elif seen.holds and seen.labels is not None:
                key = (name, seen.labels)
                holding[key] = Condition(name, dict(seen.labels), _line(seen.summary), seen.value, seen.threshold)
    return Assessment(list(holding.values()), frozenset(unknown), frozenset(lingering))


def _is_off(name: str, settings: Settings) -> bool:
    """Whether what an alert is about is switched off: that nobody knows of it then does not keep the alert."""
    no_redis = settings.redis_url is None
    return {
        "TruthGPTRedisAway": no_redis,
        "TruthGPTLimitsDegraded": no_redis or settings.limits == "off",
        "TruthGPTJobFailing": no_redis or not settings.maintenance,
        "TruthGPTAuditAway": not settings.audit,
        "TruthGPTBackupTooOld": not settings.backup,
    }.get(name, False)


def _memory(figures: Figures, settings: Settings) -> Iterator[_Seen]:
    memory = _mapping(figures.get("memory"))
    yield _share("the memory", memory.get("used_bytes"), memory.get("total_bytes"), settings.alert_memory)


def _gpu_memory(figures: Figures, settings: Settings) -> Iterator[_Seen]:
    for labels, row in _rows(figures, "gpus", "gpu"):
        what = f"the memory of GPU {labels[0][1]}" if labels else ""
        yield _share(what, row.get("used_bytes"), row.get("total_bytes"), settings.alert_gpu_memory, labels)


def _disks(figures: Figures, settings: Settings) -> Iterator[_Seen]:
    for labels, row in _rows(figures, "disks", "folder"):
        free, total = _number(row.get("free_bytes")), _number(row.get("total_bytes"))
        used = None if free is None or total is None else total - free
        what = f"the disk of the folder {labels[0][1]}" if labels else ""
        yield _share(what, used, total, settings.alert_disk, labels)


def _share(what: str, used: object, total: object, limit: float, labels: Labels | None = ()) -> _Seen:
    part, whole = _number(used), _number(total)
    if part is None or whole is None or whole <= 0 or not math.isfinite(part / whole):
        return _Seen(None, labels=labels)
    ratio = part / whole
    return _Seen(
        ratio > limit, f"{ratio:.1%} of {what} is in use; the threshold is {limit:.0%}.", round(ratio, 4), limit, labels
    )


def _errors(figures: Figures, settings: Settings) -> Iterator[_Seen]:
    rate, requests = _number(figures.get("error_rate")), _number(figures.get("requests"))
    limit, window_s = settings.alert_error_rate, _number(figures.get("window_s"))
    few = requests is not None and requests < settings.alert_error_requests
    if few and window_s is not None and window_s < WHOLE_WINDOW_S:
        yield _Seen(None)  # a gateway that has just begun: few in so short a time say nothing
    elif few or (rate is not None and rate <= limit):
        yield _Seen(False)
    elif rate is None or requests is None:
        yield _Seen(None)
    else:
        summary = f"{rate:.1%} of {requests:.0f} requests in five minutes failed; the threshold is {limit:.0%}."
        yield _Seen(True, summary, round(rate, 4), limit)


def _queues(figures: Figures, settings: Settings) -> Iterator[_Seen]:
    limit = settings.alert_queue
    for labels, row in _rows(figures, "models", "name", "model"):
        waiting = _number(row.get("waiting"))
        if waiting is None:
            yield _Seen(None, labels=labels)
        else:
            summary = f"{waiting:.0f} requests wait for the model {_of(labels)}; the threshold is {limit}."
            yield _Seen(waiting >= limit, summary, waiting, float(limit), labels)


def _breakers(figures: Figures, settings: Settings) -> Iterator[_Seen]:
    for labels, row in _rows(figures, "models", "name", "model"):
        state = row.get("breaker")
        known = state if state in ("closed", "half_open", "open") else None
        summary = f"The circuit breaker of the model {_of(labels)} is open."
        # half open, the next request decides; a model that nobody asks would stay so for ever
        yield _Seen(None if known is None else known == "open", summary, labels=labels, lingers=known == "half_open")


def _not_ready(figures: Figures, settings: Settings) -> Iterator[_Seen]:
    for labels, row in _rows(figures, "models", "name", "model"):
        yield _flag(row.get("ready"), False, f"The model {_of(labels)} is not ready.", labels)


def _on_fallback(figures: Figures, settings: Settings) -> Iterator[_Seen]:
    for labels, row in _rows(figures, "models", "name", "model"):
        summary = f"The model {_of(labels)} runs on the CPU because its device failed."
        yield _flag(row.get("fallback"), True, summary, labels)


def _jobs(figures: Figures, settings: Settings) -> Iterator[_Seen]:
    for labels, row in _rows(figures, "jobs", "name", "job_name"):
        error = row.get("error")
        why = f": {error}" if isinstance(error, str) and error else "."
        yield _flag(row.get("failing"), True, f"The last run of the job {_of(labels)} failed{why}", labels)


def _backup(figures: Figures, settings: Settings) -> Iterator[_Seen]:
    backup, limit = _mapping(figures.get("backup")), settings.alert_backup_age_s
    wanted = backup.get("wanted")
    if not isinstance(wanted, bool) or "newest_at" not in backup:
        yield _Seen(None)
        return
    if not wanted:
        yield _Seen(False)
        return
    newest, now, since = _number(backup["newest_at"]), _moment(figures.get("time")), _number(backup.get("since"))
    if newest is not None:
        age_s = None if now is None else now - newest
        summary = f"The newest backup is {_hours(age_s)} old; the threshold is {_hours(limit)}."
    elif backup["newest_at"] is None:
        age_s = _number(figures.get("up_s")) if now is None or since is None else now - since
        summary = f"There is no backup, and the home is {_hours(age_s)} old; the threshold is {_hours(limit)}."
    else:
        age_s, summary = None, ""
    if age_s is None:
        yield _Seen(None)
    else:
        yield _Seen(age_s > limit, summary, round(age_s), limit)


def _workers(figures: Figures, settings: Settings) -> Iterator[_Seen]:
    workers = _mapping(figures.get("workers"))
    counts = [_number(workers.get(state)) for state in ("silent", "down")]
    missing = sum(count for count in counts if count is not None)
    if missing > 0:
        yield _Seen(True, f"Workers that are silent or do not run: {missing:.0f}.", missing, 0.0)
    else:
        yield _Seen(None if None in counts else False)


def _notifications(figures: Figures, settings: Settings) -> Iterator[_Seen]:
    failing = _mapping(figures.get("notifications")).get("failing")
    if not isinstance(failing, (list, tuple)):
        yield _Seen(None)
    else:
        names = ", ".join(str(name) for name in failing)
        yield _Seen(bool(failing), f"The last message could not be sent by: {names}.")


def _one(key: str, bad: bool, summary: str) -> Callable[[Figures, Settings], Iterator[_Seen]]:
    """The check of a figure that is true or false."""

    def check(figures: Figures, settings: Settings) -> Iterator[_Seen]:
        yield _flag(figures.get(key), bad, summary, ())

    return check


_CHECKS: dict[str, Callable[[Figures, Settings], Iterator[_Seen]]] = {
    "TruthGPTMemoryHigh": _memory,
    "TruthGPTGpuMemoryHigh": _gpu_memory,
    "TruthGPTErrorRateHigh": _errors,
    "TruthGPTQueueLong": _queues,
    "TruthGPTBreakerOpen": _breakers,
    "TruthGPTRedisAway": _one("redis_up", False, "Redis does not answer."),
    "TruthGPTTritonAway": _one("triton_up", False, "Triton does not answer."),
    "TruthGPTModelNotReady": _not_ready,
    "TruthGPTModelOnFallback": _on_fallback,
    "TruthGPTDiskFull": _disks,
    "TruthGPTBackupTooOld": _backup,
    "TruthGPTJobFailing": _jobs,
    "TruthGPTWorkerDown": _workers,
    "TruthGPTAuditAway": _one("audit_up", False, "The audit log cannot be written."),
    "TruthGPTLimitsDegraded": _one("limits_degraded", True, "Limits are decided without Redis."),
    "TruthGPTNotificationsFailing": _notifications,
}


def _flag(value: object, bad: bool, summary: str, labels: Labels | None) -> _Seen:
    return _Seen(value is bad if isinstance(value, bool) else None, summary, labels=labels)


def _rows(figures: Figures, key: str, name: str, label: str = "") -> Iterator[tuple[Labels | None, Figures]]:
    """The named rows of a list, with their labels; one with None for labels where nobody can tell what there is."""
    rows = figures.get(key)
    if not isinstance(rows, (list, tuple)):
        yield None, {}
        return
    for row in rows:
        called = _mapping(row).get(name)
        if isinstance(called, (str, int)) and not isinstance(called, bool):
            yield ((label or name, _line(str(called))[:LABEL_CHARS]),), row


def _of(labels: Labels | None) -> str:
    return labels[0][1] if labels else ""


def _mapping(value: object) -> Figures:
    return value if isinstance(value, Mapping) else {}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _moment(value: object) -> float | None:
    try:
        return datetime.fromisoformat(value).timestamp() if isinstance(value, str) else None
    except (ValueError, OverflowError, OSError):
        return None


def _hours(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 3600:.1f} hours"


def _line(text: str) -> str:
    """One line for people, secrets masked: some of it is what others have written."""
    shown = "".join(letter if letter.isprintable() else " " for letter in masked(text))
    return shown if len(shown) <= SUMMARY_CHARS else f"{shown[: SUMMARY_CHARS - 1]}…"
