"""What is kept of alerts: their state, who says that they hold, who was told. As JSON, and back, every field checked.

Times are Unix seconds. An instance is one gateway: host, process and when it began.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

VERSION = 1
MAX_ALERTS = 200
FIRING, RESOLVED = "firing", "resolved"
QUEUED, OK, FAILED, ELSEWHERE = "queued", "ok", "error", "elsewhere"  # what became of a message

_T = TypeVar("_T")


@dataclass
class Acknowledged:
    """Somebody looks after it: it is not told again until it is resolved."""

    by: str
    at: float
    note: str = ""


@dataclass
class Message:
    """The newest thing to be told of an alert. `by` is the instance that tells it."""

    id: str
    at: float
    by: str
    repeats: int = 0


@dataclass
class Told:
    """What became of a message at one sender."""

    message: str
    outcome: str
    at: float


@dataclass
class Alert:
    """`since` is when it began to hold, `fired` when it had for as long as its rule says; `host` saw it first.

    It fires for as long as one of `holders`, instances that are alive, says that it does.
    """

    id: str
    name: str
    severity: str
    labels: dict[str, str]
    host: str
    summary: str
    value: float | None
    threshold: float | None
    state: str
    since: float
    fired: float
    resolved: float | None
    acknowledged: Acknowledged | None
    holders: list[str]
    message: Message
    told: dict[str, Told] = field(default_factory=dict)

    @property
    def firing(self) -> bool:
        return self.state == FIRING


@dataclass
class Document:
    """All alerts by their identity, and when each instance last looked."""

    watchers: dict[str, float] = field(default_factory=dict)
    alerts: dict[str, Alert] = field(default_factory=dict)

    def seen(self) -> float | None:
        """When anybody last looked."""
        return max(self.watchers.values(), default=None)


def to_json(document: Document) -> dict[str, Any]:
    alerts = [asdict(alert) for alert in document.alerts.values()]
    return {"version": VERSION, "watchers": document.watchers, "alerts": alerts}


def from_json(data: Any) -> Document:
    """Raises ValueError for what is no such document, or another version's."""
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise ValueError(f"not a document of version {VERSION}")
    document = Document({_text(name): _number(at) for name, at in _get(data, "watchers", dict).items()})
    for row in _get(data, "alerts", list)[:MAX_ALERTS]:
        alert = _alert(row)
        document.alerts[alert.id] = alert
    return document


def _alert(row: Any) -> Alert:
    if not isinstance(row, dict):
        raise ValueError("an alert is no object")
    message, acknowledged = _get(row, "message", dict), row.get("acknowledged")
    state = _get(row, "state", str)
    if state not in (FIRING, RESOLVED):
        raise ValueError(f"{state!r} is no state of an alert")
    return Alert(
        id=_get(row, "id", str), name=_get(row, "name", str), severity=_get(row, "severity", str),
        labels={_text(key): _text(value) for key, value in _get(row, "labels", dict).items()},
        host=_get(row, "host", str), summary=_get(row, "summary", str), value=_maybe(row, "value"),
        threshold=_maybe(row, "threshold"), state=state, since=_number(row.get("since")),
        fired=_number(row.get("fired")), resolved=_maybe(row, "resolved"),
        acknowledged=None if acknowledged is None else _acknowledged(acknowledged),
        holders=[_text(holder) for holder in _get(row, "holders", list)],
        message=Message(
            _get(message, "id", str), _number(message.get("at")), _get(message, "by", str),
            int(_number(message.get("repeats"))),
        ),
        told={_text(sender): _told(told) for sender, told in _get(row, "told", dict).items()},
    )  # fmt: skip


def _acknowledged(row: Any) -> Acknowledged:
    return Acknowledged(_get(row, "by", str), _number(_get(row, "at", object)), _get(row, "note", str))


def _told(row: Any) -> Told:
    return Told(_get(row, "message", str), _get(row, "outcome", str), _number(_get(row, "at", object)))


def _get(row: Any, key: str, kind: type[_T]) -> _T:
    value = row.get(key) if isinstance(row, Mapping) else None
    if not isinstance(value, kind):
        raise ValueError(f"{key} is no {kind.__name__}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("something is no text")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("something is no number")
    return float(value)


def _maybe(row: Mapping[str, Any], key: str) -> float | None:
    return None if row.get(key) is None else _number(row[key])
