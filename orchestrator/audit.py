"""The audit log's sink: takes what happened on the event loop without ever waiting, and writes it from a thread.

What finds no room in the queue, or cannot be written before the end, is counted; a `lost` event says so as soon as
writing works again. `start` and `stop` frame what a process has written: one that was killed has no `stop`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable

from orchestrator.auditevents import Flood, Minute, event_of, of_incident, of_request
from orchestrator.auditlog import CURRENT, AuditLogError, check_key, encode, folder_of, rotated, stamp
from orchestrator.auditwriter import AuditLog
from orchestrator.domain import Record
from orchestrator.fingerprint import AuditKeyError, Fingerprint, load_key
from orchestrator.incident import Incident
from orchestrator.settings import Settings

__all__ = ["Audit", "AuditKeyError", "AuditLogError", "check", "fingerprint_of", "off", "start"]

log = logging.getLogger(__name__)

TICK_S = 0.1
RETRY_S = 0.5  # while nothing can be written
SYNC_S = 1.0
SUMMARY_S = 10.0
MINUTE_S = 60.0
CLOSE_S = 2.0
QUEUED = 10_000  # events that may wait: at some 2 KB each
BATCH = 64  # events of one write
AT_ONCE = 32  # events that are made in one go: some 0.2 ms, as chaining a batch takes
BREATH_S = 0.0002  # then the event loop may run; it would wait for 5 ms else, and giving way for no time is too short


class Audit:
    """`record` and `incident` are sinks, for one thread; everything else may be called from any.

    `lost_total` counts events that were not written, `reason` says why nothing can be written now, empty where it can.
    """

    def __init__(
        self, log: AuditLog, prints: Fingerprint, clock: Callable[[], float] = time.time, queued: int = QUEUED
    ) -> None:
        self.prints = prints
        self._log, self._clock, self._queued = log, clock, queued
        self._queue: deque[Record | Incident | bytes] = deque()
        self._pending: list[bytes] = []
        self._batch = BATCH
        self._flood = Flood()
        self._over: dict[str, int] = {}  # how many of a flood have been told of
        self._refused = self._refused_told = 0  # requests among them
        self._overflown = self._unmade = 0  # events that are lost; each is counted by one thread alone
        self._lost_told = 0
        self._lost_since: float | None = None
        self.reason = ""
        self._minute = Minute(clock())
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)

    @property
    def lost_total(self) -> int:
        return self._overflown + self._unmade

    @property
    def state(self) -> str:
        """ok or degraded."""
        return "degraded" if self.reason else "ok"

    def health(self) -> dict[str, object]:
        """For people: state, the reason of a degraded one, and how many events are lost."""
        return {"state": self.state, "reason": self.reason or None, "lost": self.lost_total}

    def record(self, record: Record) -> None:
        """A sink of the gateway's."""
        if record.error is not None and not self._flood.admits(record.error):
            self._refused += 1
        else:
            self._enqueue(record)

    def incident(self, incident: Incident) -> None:
        """What an edge reports."""
        # what an administrator does is no flood, and each of it counts
        if incident.kind == "admin" or self._flood.admits(incident.kind):
            self._enqueue(incident)

    def start(self) -> None:
        """Begin to write."""
        self._say("start", {})
        self._thread.start()

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what waits, and end. What cannot be written in that time is lost, and the log says how much."""
        self._ending.set()
        self._thread.join(timeout_s)
        left = len(self._queue) + len(self._pending) + self.lost_total - self._lost_told
        left += sum(self._flood.over().values()) - sum(self._over.values())
        if self._thread.is_alive() or left:
            log.error("the audit log ends without %d events: %s", left, self.reason or "writing takes too long")

    def _enqueue(self, item: Record | Incident) -> None:
        if len(self._queue) < self._queued:
            self._queue.append(item)
        else:
            if self._lost_since is None:
                self._lost_since = self._clock()
            self._overflown += 1

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self.reason = f"its writer failed with {type(error).__name__}"
            log.exception("the audit log is not written any more")
        finally:
            self._log.close()

    def _work(self) -> None:
        synced = summed = time.monotonic()
        while not self._ending.wait(RETRY_S if self.reason else TICK_S):
            now = time.monotonic()
            if now - summed >= SUMMARY_S:
                summed = now
                self._summarise()
            if self._clock() - self._minute.began >= MINUTE_S:
                self._end_minute()
            well = self._write()
            if well and now - synced >= SYNC_S:
                well = self._attempt(self._log.sync)
                synced = now if well else synced
            if well and self.reason:
                log.warning("the audit log is written again; %d events were lost so far", self.lost_total)
                self.reason = ""
        if self._write():
            self._summarise()
            self._end_minute()
            self._say("stop", {"lost": self.lost_total})
            if self._write():
                self._attempt(self._log.sync)

    def _write(self) -> bool:
        """All that waits; whether it is written."""
        while True:
            self._make()
            if not self._pending:
                return True
            if not self._attempt(self._append):
                self._batch = max(1, self._batch // 8)  # there may be room for some
                return False
            self._batch = min(BATCH, self._batch * 2)
            lost = self.lost_total
            if lost > self._lost_told:
                since = None if self._lost_since is None else stamp(self._lost_since)
                if not self._say_now("lost", {"count": lost - self._lost_told, "since": since}):
                    return False
                self._lost_told, self._lost_since = lost, None

    def _make(self) -> None:
        """Turn what waits into a batch."""
        while self._queue and len(self._pending) < BATCH:
            for _ in range(min(AT_ONCE, len(self._queue))):
                item = self._queue.popleft()
                try:
                    self._pending.append(self._made(item))
                except Exception:  # one that is not as it should be keeps no other from being written
                    self._unmade += 1
                    log.exception("an event of the audit log could not be made")
            if self._queue:
                time.sleep(BREATH_S)

    def _made(self, item: Record | Incident | bytes) -> bytes:
        if isinstance(item, Record):
            self._minute.add(item)
            return of_request(item, self.prints)
        return of_incident(item, self.prints) if isinstance(item, Incident) else item

    def _append(self) -> None:
        del self._pending[: self._log.append(self._pending[: self._batch])]

    def _attempt(self, step: Callable[[], object]) -> bool:
        try:
            step()
        except (OSError, AuditLogError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            if not self.reason:
                log.error("the audit log cannot be written: %s; up to %d events wait", reason, self._queued)
            self.reason = reason
            return False
        return True

    def _summarise(self) -> None:
        """Tell of what was only counted."""
        for kind, count in self._flood.over().items():
            more = count - self._over.get(kind, 0)
            if more:
                if not self._say_now(event_of(kind), {"kind": kind, "only_counted": more}):
                    return
                self._over[kind] = count

    def _end_minute(self) -> None:
        now, refused = self._clock(), self._refused
        figures = self._minute.figures(now, refused - self._refused_told)
        self._refused_told, self._minute = refused, Minute(now)
        if figures:
            self._say("performance", figures)

    def _say(self, event: str, fields: dict[str, object]) -> None:
        """An event of this process's own."""
        self._queue.append(self._own(event, fields))

    def _say_now(self, event: str, fields: dict[str, object]) -> bool:
        """The same before what waits; whether it is written. What it tells of is told only then."""
        return self._attempt(lambda: self._log.append([self._own(event, fields)]))

    def _own(self, event: str, fields: dict[str, object]) -> bytes:
        return encode(event, self._clock(), {"pid": os.getpid(), **fields})


def fingerprint_of(settings: Settings, create: bool = True) -> Fingerprint:
    """The hashes of this deployment's key. A key is made where there is none and no log that needs another.

    Raises AuditKeyError.
    """
    folder = folder_of(settings.home)
    fresh = not (folder / CURRENT).exists() and not rotated(folder)
    return Fingerprint(load_key(settings.home, settings.audit_key, create and fresh))


def check(settings: Settings) -> None:
    """Whether there is a key, and whether it is the log's. Raises AuditKeyError or AuditLogError.

    Where the log cannot be read for another reason, the sink will say so.
    """
    if settings.audit:
        prints = fingerprint_of(settings)
        with contextlib.suppress(OSError):
            check_key(folder_of(settings.home), prints)


def off() -> dict[str, object]:
    """What /health says where nothing is written."""
    return {"state": "off", "reason": None, "lost": 0}


def start(settings: Settings) -> Audit | None:
    """This process's sink, running; None where the settings want none. Raises AuditKeyError."""
    if not settings.audit:
        return None
    prints = fingerprint_of(settings)
    audit = Audit(AuditLog(settings.home, prints, settings.audit_max_bytes), prints)
    audit.start()
    return audit
