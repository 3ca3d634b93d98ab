"""Looks every few seconds at the figures of the deployment, keeps the alert book, and has people told.

Runs in the gateway's first process, on its loop, which it never holds up: files are read and written by a thread with a
deadline, messages sent by others. Without the disk the book is in memory, without Redis each replica tells for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from orchestrator.metrics import Labels, Reading
from orchestrator.monitor import alertbook, alertstate, claims
from orchestrator.monitor.alerts import ELSEWHERE, Alert, Document
from orchestrator.monitor.alertstate import Due, Tracker, Watch
from orchestrator.monitor.aside import Aside
from orchestrator.monitor.conditions import Figures, assess
from orchestrator.monitor.notice import Notice, of_alert
from orchestrator.monitor.notifier import Notifier
from orchestrator.monitor.rules import CRITICAL, RULES, WARNING
from orchestrator.settings import Settings
from orchestrator.store import Store

log = logging.getLogger(__name__)

BOOK_S = 3.0  # to read and write the book

_T = TypeVar("_T")


class Watcher:
    """`figures` is called on the loop; `clock` never goes back, `now` is Unix time. `host` names this machine."""

    def __init__(
        self, settings: Settings, figures: Callable[[], Figures], notifier: Notifier, store: Store | None = None,
        clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time, host: str | None = None,
    ) -> None:  # fmt: skip
        self._settings, self._figures, self._notifier, self._store = settings, figures, notifier, store
        self._clock, self._now, self._host = clock, now, host or socket.gethostname()
        interval_s = settings.alert_interval_s
        self._watch = Watch(
            f"{self._host}:{os.getpid()}:{secrets.token_hex(4)}", self._host, notifier.names, settings.alert_repeat_s,
            alertstate.absent_s(interval_s),
        )  # fmt: skip
        self._replica = f"{self._host}:{settings.home.absolute()}"  # the same after a restart
        self._tracker = Tracker(self._host, alertstate.clear_s(interval_s))
        self._began = clock()
        self._document = Document()
        self._unwritten: str | None = None  # why the book in memory is newer than the one on the disk
        self._renewed = -math.inf
        self._aside = Aside("alert book")
        self._unfinished: set[tuple[str, str]] = set()
        self._results: list[tuple[str, str, str, str]] = []
        self._said: set[str] = set()  # faults that are in the log, until they are over
        self._heard = asyncio.Event()

    async def run(self) -> None:
        """Watch until cancelled."""
        loop = asyncio.get_running_loop()

        def done(sender: str, notice: Notice, outcome: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._finished, sender, notice, outcome)

        self._notifier.on_done = done
        try:
            while True:
                until = loop.time() + self._settings.alert_interval_s
                await self._guarded("the alerts cannot be looked at", self.look)
                while (left_s := until - loop.time()) > 0:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(left_s):  # wait_for swallows a cancellation now and then
                            await self._heard.wait()
                    if self._heard.is_set():
                        await self._guarded("what was sent cannot be noted", self._note)
        finally:
            self._notifier.close()

    async def look(self) -> None:
        """Once: what holds, what follows from that, and who is to know."""
        figures: Figures = {}
        try:
            figures = self._figures()
            self._over("figures")
        except Exception as error:
            self._fault("figures", "the figures for the alerts cannot be had", error)
        own = {"notifications": {"failing": self._notifier.failing()}, "up_s": self._clock() - self._began}
        found = assess({**figures, **own}, self._settings)
        sightings, released = self._tracker.look(found, self._document.alerts.values(), self._clock())
        watch, now = self._now_watch(), self._now()

        def edit(document: Document) -> tuple[list[Due], list[Alert]]:
            return alertstate.step(document, sightings, released, watch, now)

        due, changed = await self._change(edit)
        for alert in changed:
            level = logging.WARNING if alert.firing else logging.INFO
            log.log(level, "alert %s: %s %s", alert.state, alert.name, alert.summary)
        for message in due:
            await self._tell(message)
        self._renew()

    def counts(self) -> dict[str, int]:
        """How many alerts fire, and how many of them are critical."""
        return alertstate.counts(self._document)

    def figures(self) -> dict[str, Any]:
        """Its part of the summary: what fires, and why the book on the disk does not have that, None where it has."""
        names = {alert.name for alert in self._document.alerts.values() if alert.firing}
        return {**self.counts(), "names": sorted(names), "unwritten": self._unwritten}

    def readings(self) -> dict[str, Reading]:
        """The series that are read from here, see metrics_table.py."""

        def firing() -> Mapping[Labels, float]:
            now = self.counts()
            return {(CRITICAL,): float(now["critical"]), (WARNING,): float(now["firing"] - now["critical"])}

        return {"truthgpt_alerts_firing": firing, "truthgpt_notifications_total": self._notifier.counts}

    async def _tell(self, due: Due) -> None:
        notice, alert = of_alert(due.alert), due.alert
        rule = RULES.get(alert.name)
        if self._store is not None and rule is not None and rule.shared:
            watch, repeats = self._watch, alert.message.repeats
            answer = await claims.claim(
                self._store, alert.id, alert.state, self._replica, self._now(), watch.repeat_s, repeats, watch.absent_s
            )
            if answer == claims.LATER:
                return  # it stays queued in the book, and is due again at the next look
            if answer == claims.ELSEWHERE:
                self._results += [(alert.id, notice.id, sender, ELSEWHERE) for sender in due.senders]
                self._heard.set()
                return
        self._unfinished |= {(notice.id, sender) for sender in due.senders}
        self._notifier.tell(notice, due.senders)

    def _renew(self) -> None:
        """Say to the other replicas, three times within the time that it counts, what this one still sees fire."""
        watch = self._watch
        if self._store is None or self._clock() - self._renewed < watch.absent_s / 3:
            return
        self._renewed = self._clock()
        for alert in self._document.alerts.values():
            rule = RULES.get(alert.name)
            if alert.firing and rule is not None and rule.shared and watch.instance in alert.holders:
                claims.renew(self._store, alert.id, self._replica, watch.repeat_s, watch.absent_s)

    async def _note(self) -> None:
        self._heard.clear()
        watch, now = self._now_watch(), self._now()
        await self._change(lambda document: alertstate.note(document, watch, now))

    def _now_watch(self) -> Watch:
        results, self._results = tuple(self._results), []
        return replace(self._watch, unfinished=frozenset(self._unfinished), results=results)

    def _finished(self, sender: str, notice: Notice, outcome: str) -> None:
        """A sender is done with a message."""
        self._unfinished.discard((notice.id, sender))
        ids = [alert.id for alert in self._document.alerts.values() if alert.message.id == notice.id]
        self._results += [(id, notice.id, sender, outcome) for id in ids]
        self._heard.set()

    async def _change(self, edit: Callable[[Document], _T]) -> _T:
        """Edit the book on the disk, else the one in memory."""
        memory, home = self._document, self._settings.home
        unsaved = self._unwritten is not None

        def edited(disk: Document) -> tuple[Document, _T]:
            document = alertstate.merge(disk, copy.deepcopy(memory)) if unsaved else disk
            return document, edit(document)

        try:
            self._document, result = await self._aside.run(lambda: alertbook.update(home, edited), BOOK_S)
            self._unwritten = None
            self._over("book")
        except (OSError, RuntimeError) as error:
            self._fault("book", "the alert book cannot be kept on the disk, and is in memory", error)
            self._document, self._unwritten = copy.deepcopy(memory), _why(error)
            result = edit(self._document)
        return result

    async def _guarded(self, what: str, function: Callable[[], object]) -> None:
        """A fault of the watcher is no reason to lose the watcher, nor what it runs in."""
        try:
            await function()  # type: ignore[misc]
            self._over(what)
        except Exception as error:
            self._fault(what, what, error)

    def _fault(self, kind: str, what: str, error: Exception) -> None:
        if kind not in self._said:
            self._said.add(kind)
            log.error("%s: %s", what, _why(error), exc_info=None if isinstance(error, OSError) else error)

    def _over(self, kind: str) -> None:
        self._said.discard(kind)


def _why(error: Exception) -> str:
    return (isinstance(error, OSError) and (error.strerror or str(error))) or type(error).__name__
