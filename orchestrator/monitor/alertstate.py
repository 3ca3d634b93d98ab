"""How alerts change from one look to the next: they fire, are told, repeated, resolved, and forgotten. Pure.

Several gateways may look after one book, because they share a home. Each says of every alert whether it holds as far as
it can see; the alert is resolved once no gateway that is alive says so. Whoever makes a change tells it, and the others
take over what a gateway that is gone has not told.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, replace

from orchestrator.monitor.alerts import (
    ELSEWHERE,
    FAILED,
    FIRING,
    MAX_ALERTS,
    OK,
    QUEUED,
    RESOLVED,
    Alert,
    Document,
    Message,
    Told,
)
from orchestrator.monitor.conditions import Assessment, Condition
from orchestrator.monitor.rules import CRITICAL, RULES, identity

KEPT_S = 3600.0  # after it was resolved
CLEAR_S, CLEAR_LOOKS = 60.0, 6  # for so long, or in so many looks where that is shorter, it must not have held
LINGER = 5  # times as long for what is likely to hold again
ABSENT_S, ABSENT_LOOKS = 60.0, 3  # a gateway that has not looked for the longer of the two is gone
AGAIN_S = 300.0  # after a sender gave up, while the message is still the newest of its alert


def clear_s(interval_s: float) -> float:
    return min(CLEAR_S, CLEAR_LOOKS * interval_s)


def absent_s(interval_s: float) -> float:
    return max(ABSENT_S, ABSENT_LOOKS * interval_s)


@dataclass(frozen=True)
class Sighting:
    """A condition that holds now, has for `held_s`, and by its rule for long `enough`."""

    id: str
    condition: Condition
    held_s: float
    enough: bool


class Tracker:
    """How long each alert has held, or has not, by a clock that never goes back."""

    def __init__(self, host: str, clear_s: float) -> None:
        self._host, self._clear_s = host, clear_s
        self._since: dict[str, float] = {}  # when it began to hold
        self._last: dict[str, tuple[float, Condition]] = {}  # when it was last seen to hold, and how
        self._clear: dict[str, float] = {}  # since when a firing one is known not to hold

    def look(self, found: Assessment, alerts: Collection[Alert], now: float) -> tuple[list[Sighting], frozenset[str]]:
        """What holds, and the firing alerts among `alerts` that have not held for long enough to be resolved."""
        sightings = []
        for condition in found.holding:
            id = identity(condition.name, condition.labels, self._host)
            held_s = now - self._since.setdefault(id, now)
            self._last[id] = now, condition
            sightings.append(Sighting(id, condition, held_s, held_s >= RULES[condition.name].for_s))
        holding = {sighting.id for sighting in sightings}
        for id, (at, condition) in list(self._last.items()):
            # a short gap in what is known does not begin the wait anew, but what does not hold does
            gap = found.is_unknown(condition.name, condition.labels) and now - at <= self._clear_s
            if id not in holding and not gap:
                del self._since[id], self._last[id]
        firing = {alert.id: alert for alert in alerts if alert.firing}
        for id, alert in firing.items():
            if id in holding or found.is_unknown(alert.name, alert.labels):
                self._clear.pop(id, None)
            else:
                self._clear.setdefault(id, now)
        self._clear = {id: since for id, since in self._clear.items() if id in firing}
        over = set()
        for id, since in self._clear.items():
            lingers = found.lingers(firing[id].name, firing[id].labels)
            if now - since >= self._clear_s * (LINGER if lingers else 1):
                over.add(id)
        return sightings, frozenset(over)


@dataclass(frozen=True)
class Watch:
    """Who looks and how: the instance and its host, the names of its senders, what they have not finished with.

    In `results` is what became of messages: (alert's id, message's id, sender, outcome).
    """

    instance: str
    host: str
    senders: tuple[str, ...]
    repeat_s: float
    absent_s: float
    unfinished: Set[tuple[str, str]] = frozenset()
    results: tuple[tuple[str, str, str, str], ...] = ()


@dataclass(frozen=True)
class Due:
    """The newest message of an alert is to be sent now, by these senders."""

    alert: Alert
    senders: tuple[str, ...]


def step(
    document: Document, sightings: list[Sighting], released: Set[str], watch: Watch, now: float
) -> tuple[list[Due], list[Alert]]:
    """Change the document to what was seen at the Unix time `now`: what is to be sent, and what fired or was resolved.

    `released` are the alerts of which this instance says no longer that they hold.
    """
    note(document, watch, now)
    looked = document.watchers.get(watch.instance)
    if looked is None or not 0 <= now - looked < watch.absent_s / 3:
        document.watchers[watch.instance] = now  # not at every look: the book is written when something has changed
    alive = {name: at for name, at in document.watchers.items() if abs(now - at) <= watch.absent_s}
    document.watchers = alive
    changed = []
    seen = {sighting.id: sighting for sighting in sightings}
    for sighting in sightings:
        before = document.alerts.get(sighting.id)
        if before is not None and before.firing:
            before.summary, before.value = sighting.condition.summary, sighting.condition.value
            before.threshold = sighting.condition.threshold
        elif sighting.enough and _has_room(document, sighting.id):
            alert = document.alerts[sighting.id] = _fired(sighting, watch, now)
            changed.append(alert)
    for alert in document.alerts.values():
        if alert.firing:
            _hold(alert, alert.id in seen or alert.id not in released, watch, alive)
            if not alert.holders:
                alert.state, alert.resolved, alert.acknowledged = RESOLVED, now, None
                alert.message = Message(f"{alert.message.id.partition('-')[0]}-resolved", now, watch.instance)
                changed.append(alert)
    document.alerts = {
        id: alert for id, alert in document.alerts.items()
        if alert.resolved is None or -KEPT_S <= now - alert.resolved < KEPT_S
    }  # fmt: skip
    return [due for alert in document.alerts.values() if (due := _due(alert, watch, alive, now))], changed


def note(document: Document, watch: Watch, now: float) -> None:
    """Write down what became of messages."""
    for id, message, sender, outcome in watch.results:
        alert = document.alerts.get(id)
        if alert is not None and alert.message.id == message:
            alert.told[sender] = Told(message, outcome, now)


def merge(disk: Document, memory: Document) -> Document:
    """The book as it should be, where `memory` could not be written: it counts, but for what others did meanwhile."""
    merged = Document({**disk.watchers, **memory.watchers}, dict(memory.alerts))
    for id, alert in disk.alerts.items():
        own = merged.alerts.get(id)
        if own is None:
            if not set(alert.holders) <= set(memory.watchers):
                merged.alerts[id] = alert
        elif own.fired == alert.fired and own.firing and own.acknowledged is None:
            own.acknowledged = alert.acknowledged
    return merged


def counts(document: Document) -> dict[str, int]:
    """How many fire, and how many of them are critical."""
    firing = [alert.severity for alert in document.alerts.values() if alert.firing]
    return {"firing": len(firing), "critical": firing.count(CRITICAL)}


def _fired(sighting: Sighting, watch: Watch, now: float) -> Alert:
    condition = sighting.condition
    return Alert(
        id=sighting.id, name=condition.name, severity=RULES[condition.name].severity, labels=dict(condition.labels),
        host=watch.host, summary=condition.summary, value=condition.value, threshold=condition.threshold, state=FIRING,
        since=now - sighting.held_s, fired=now, resolved=None, acknowledged=None, holders=[],
        message=Message(f"{sighting.id}{int(now * 1000):x}-firing", now, watch.instance),
    )  # fmt: skip


def _has_room(document: Document, id: str) -> bool:
    """Whether one more alert may be kept; the one that was resolved first makes room."""
    if id in document.alerts or len(document.alerts) < MAX_ALERTS:
        return True
    resolved = [alert for alert in document.alerts.values() if alert.resolved is not None]
    if resolved:
        del document.alerts[min(resolved, key=lambda alert: alert.resolved or 0.0).id]
    return bool(resolved)


def _hold(alert: Alert, holds: bool, watch: Watch, alive: Mapping[str, float]) -> None:
    """Say whether it holds as far as this instance can see. Of another machine's own alerts it sees nothing."""
    rule = RULES.get(alert.name)
    mine = rule is not None and (rule.shared or alert.host == watch.host)
    others = [holder for holder in alert.holders if holder in alive and holder != watch.instance]
    alert.holders = sorted([*others, watch.instance]) if mine and holds else others


def _due(alert: Alert, watch: Watch, alive: Mapping[str, float], now: float) -> Due | None:
    message = alert.message
    if message.by != watch.instance:
        if message.by in alive:
            return None
        message = alert.message = replace(message, by=watch.instance)
    if alert.firing and alert.acknowledged is not None:
        return None
    if alert.firing and now - message.at >= watch.repeat_s:
        repeats = message.repeats + 1
        base = message.id.partition("-")[0]
        message = alert.message = Message(f"{base}-firing-{repeats}", now, watch.instance, repeats)
    senders = tuple(sender for sender in watch.senders if _wants(alert, sender, watch, now))
    for sender in senders:
        alert.told[sender] = Told(message.id, QUEUED, now)
    return Due(alert, senders) if senders else None


def _wants(alert: Alert, sender: str, watch: Watch, now: float) -> bool:
    told = alert.told.get(sender)
    if told is None:
        return alert.firing  # nobody wants to hear of the end of what he has not heard of
    if told.message != alert.message.id:
        return True
    if told.outcome == FAILED:
        return now - told.at >= AGAIN_S
    return told.outcome not in (OK, ELSEWHERE) and (told.message, sender) not in watch.unfinished
