"""A watcher's looks by hand: clocks that a test turns, and figures that it sets."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.monitor.alerts import Alert, Document, from_json, to_json
from orchestrator.monitor.alertstate import Due, Tracker, Watch, step
from orchestrator.monitor.conditions import assess
from tests.orchestrator.monitor.test_conditions import SETTINGS, WELL


@dataclass
class Looker:
    """One instance that looks at a document. Every message is sent at once, with `outcome`; "" leaves it unfinished."""

    host: str = "a"
    senders: tuple[str, ...] = ("webhook",)
    repeat_s: float = 3600.0
    outcome: str = "ok"
    document: Document = field(default_factory=Document)
    clock: float = 0.0
    sent: list[tuple[str, str]] = field(default_factory=list)  # state, message's id

    def __post_init__(self) -> None:
        self.tracker = Tracker(self.host, 60.0)
        self.watch = Watch(f"{self.host}:{id(self)}", self.host, self.senders, self.repeat_s, 60.0)
        self.unfinished: set[tuple[str, str]] = set()
        self.results: list[tuple[str, str, str, str]] = []

    def look(self, at: float, **figures: Any) -> list[Due]:
        """At a time in seconds; the clocks and the Unix time are the same here."""
        found = assess({**copy.deepcopy(WELL), **figures}, SETTINGS)
        sightings, released = self.tracker.look(found, self.document.alerts.values(), at)
        watch = replace(self.watch, unfinished=frozenset(self.unfinished), results=tuple(self.results))
        self.results = []
        due, _ = step(self.document, sightings, released, watch, at)
        # whatever it is, it survives being written and read
        self.document.__dict__.update(from_json(to_json(self.document)).__dict__)
        for message in due:
            alert = message.alert
            self.sent.append((alert.state, alert.message.id))
            for sender in message.senders:
                if self.outcome:
                    self.results.append((alert.id, alert.message.id, sender, self.outcome))
                else:
                    self.unfinished.add((alert.message.id, sender))
        return due

    def looks(self, begin: float, end: float, every: float = 10.0, **figures: Any) -> None:
        at = begin
        while at <= end:
            self.look(at, **figures)
            at += every

    @property
    def states(self) -> list[str]:
        return [state for state, _ in self.sent]

    def one(self) -> Alert:
        (alert,) = self.document.alerts.values()
        return alert
