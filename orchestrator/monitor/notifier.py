"""Hands messages to the senders. Each has a thread and a queue of its own, so that one that hangs delays nobody else.

The threads are daemons: nothing here holds up the end of the process. What was not sent by then is in the alert book,
and is sent by the next process.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from orchestrator.monitor.alerts import FAILED, OK
from orchestrator.monitor.attempt import SendError, within
from orchestrator.monitor.notice import Notice
from orchestrator.monitor.senders import Sender, configured
from orchestrator.settings import Settings

log = logging.getLogger(__name__)

QUEUED_MAX = 100  # messages that wait for one sender; the oldest is dropped, and counts as one that failed
PAUSE_S = 1.0  # before the second attempt; then twice as long each time
PAUSE_MAX_S = 60.0

Done = Callable[[str, Notice, str], None]  # sender, message, outcome; called in the sender's thread


class Lane:
    """One sender's thread and queue. `done` is called once for every message that was put."""

    def __init__(
        self, name: str, send: Sender, timeout_s: float, retries: int, done: Done, pause_s: float = PAUSE_S
    ) -> None:
        self.name = name
        self._send, self._timeout_s, self._retries, self._done, self._pause_s = send, timeout_s, retries, done, pause_s
        self._queue: deque[Notice] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, notice: Notice) -> None:
        """Queue a message. Never waits for the sender. Raises RuntimeError where no thread is to be had."""
        dropped = None
        with self._changed:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=f"alerts by {self.name}", daemon=True)
                thread.start()
                self._thread = thread
            if len(self._queue) >= QUEUED_MAX:
                dropped = self._queue.popleft()
            self._queue.append(notice)
            self._changed.notify_all()
        if dropped is not None:
            log.error("alerts by %s: too many wait, the message of %s is dropped", self.name, dropped.name)
            self._done(self.name, dropped, FAILED)

    def close(self) -> None:
        """End the thread once the attempt that runs is over; what waits is not sent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                notice = self._queue.popleft()
            try:
                outcome = self._deliver(notice)
            except Exception:  # a fault of ours with one message is none with the next
                log.exception("alerts by %s: the message of %s is not sent", self.name, notice.name)
                outcome = FAILED
            if outcome:
                self._done(self.name, notice, outcome)

    def _deliver(self, notice: Notice) -> str:
        """The outcome; empty where this ends before there is one."""
        for number in range(self._retries + 1):
            try:
                within(self._timeout_s, lambda attempt: self._send(notice, attempt))
                return OK
            except SendError as error:
                if not error.again or number == self._retries:
                    log.error("alerts by %s: the message of %s is not sent: %s", self.name, notice.name, error)
                    return FAILED
                log.warning("alerts by %s: %s; trying again", self.name, error)
                pause_s = min(PAUSE_MAX_S, self._pause_s * 2**number) * random.uniform(0.5, 1.0)  # noqa: S311
                with self._changed:  # replicas that failed together do not come back together
                    if self._changed.wait_for(lambda: self._closed, max(pause_s, error.after_s or 0.0)):
                        return ""
        return FAILED


class Notifier:
    """The senders that are configured. `on_done` is called in a sender's thread with what became of a message."""

    def __init__(
        self, settings: Settings, senders: Mapping[str, Sender] | None = None, pause_s: float = PAUSE_S
    ) -> None:
        given = configured(settings) if senders is None else senders
        timeout_s, retries = settings.alert_timeout_s, settings.alert_retries
        self._lanes = {
            name: Lane(name, send, timeout_s, retries, self._finished, pause_s) for name, send in given.items()
        }
        self._lock = threading.Lock()
        self._counts = {(name, outcome): 0 for name in self._lanes for outcome in (OK, FAILED)}
        self._last = dict.fromkeys(self._lanes, OK)
        self.on_done: Done = lambda sender, notice, outcome: None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._lanes)

    def tell(self, notice: Notice, senders: Sequence[str]) -> None:
        """Have these senders send a message. Never waits, never raises."""
        for name in senders:
            try:
                self._lanes[name].put(notice)
            except RuntimeError as error:
                log.error("alerts by %s: %s", name, error)
                self._finished(name, notice, FAILED)

    def failing(self) -> list[str]:
        """The senders that gave up their last message."""
        with self._lock:
            return sorted(name for name, outcome in self._last.items() if outcome == FAILED)

    def counts(self) -> dict[tuple[str, ...], float]:
        """Messages by sender and outcome."""
        with self._lock:
            return {labels: float(count) for labels, count in self._counts.items()}

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()

    def _finished(self, sender: str, notice: Notice, outcome: str) -> None:
        with self._lock:
            self._counts[sender, outcome] += 1
            self._last[sender] = outcome
        self.on_done(sender, notice, outcome)
