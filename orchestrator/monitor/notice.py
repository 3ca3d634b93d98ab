"""What people are told of an alert: one line, a few more, and the JSON document of the webhook."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from orchestrator.monitor.alerts import Alert
from orchestrator.monitor.rules import RULES

VERSION = 1  # of the webhook's document
TEST = "test"


@dataclass(frozen=True)
class Notice:
    """One message. `status` is firing, resolved or test; `host` is whose it is. Times are Unix seconds.

    `id` is the same whenever the same message is sent again, so that who receives it can tell.
    """

    id: str
    status: str
    at: float
    host: str
    name: str
    severity: str
    summary: str
    labels: dict[str, str]
    value: float | None
    threshold: float | None
    since: float
    resolved: float | None
    runbook: str
    advice: str
    repeated: bool = False

    def title(self) -> str:
        """One line."""
        labels = "".join(f" {value}" for value in self.labels.values())
        state = {"firing": "still fires" if self.repeated else "fires", "resolved": "is resolved"}.get(self.status, "")
        return f"{self.severity.upper()} {self.name}{labels} {state}".strip() + f" on {self.host}"

    def text(self) -> str:
        """All of it, below the title."""
        over = self.status == "resolved"
        lines = [f"It was: {self.summary}" if over else self.summary]
        if self.value is not None and self.threshold is not None and not over:
            lines.append(f"Value {self.value:g}, threshold {self.threshold:g}.")
        lines += [f"{key}: {value}" for key, value in self.labels.items()]
        lines.append(f"Since {shown(self.since)}" + (f", until {shown(self.resolved)}." if self.resolved else "."))
        if self.status == "firing":
            lines.append(f"First: {self.advice}")
        return "\n".join([*lines, f"More: {self.runbook}"])

    def document(self) -> dict[str, Any]:
        """What the webhook is sent; docs/alerts.md describes it."""
        return {
            "version": VERSION, "id": self.id, "status": self.status, "repeated": self.repeated,
            "time": rfc3339(self.at), "instance": self.host,
            "alert": {
                "name": self.name, "severity": self.severity, "labels": self.labels, "summary": self.summary,
                "value": self.value, "threshold": self.threshold, "since": rfc3339(self.since),
                "resolved": rfc3339(self.resolved) if self.resolved else None, "advice": self.advice,
                "runbook": self.runbook,
            },
        }  # fmt: skip


def of_alert(alert: Alert) -> Notice:
    """The newest message of an alert."""
    rule = RULES.get(alert.name)
    return Notice(
        id=alert.message.id, status=alert.state, at=alert.message.at, host=alert.host, name=alert.name,
        severity=alert.severity, summary=alert.summary, labels=dict(alert.labels), value=alert.value,
        threshold=alert.threshold, since=alert.since, resolved=alert.resolved, runbook=rule.runbook if rule else "",
        advice=rule.advice if rule else "", repeated=alert.message.repeats > 0 and alert.firing,
    )  # fmt: skip


def of_test(host: str, at: float, id: str) -> Notice:
    """The message of `truthgpt alerts test`."""
    return Notice(
        id=id, status=TEST, at=at, host=host, name="TruthGPTTest", severity="test", labels={}, value=None,
        threshold=None, since=at, resolved=None, summary="This is a test: messages about alerts arrive here.",
        runbook="docs/alerts.md", advice="Nothing is to be done.",
    )  # fmt: skip


def rfc3339(at: float) -> str:
    """A Unix time as RFC 3339 in UTC, to the millisecond; the epoch for what is no time of this world."""
    try:
        second, milliseconds = divmod(int(at * 1000), 1000)
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{milliseconds:03d}Z"
    except (ValueError, OverflowError, OSError):
        return "1970-01-01T00:00:00.000Z"


def shown(at: float) -> str:
    """A Unix time for people."""
    return f"{rfc3339(at)[:19].replace('T', ' ')} UTC"
