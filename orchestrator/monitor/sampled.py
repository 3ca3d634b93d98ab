"""A value that is read again and again in a thread of its own.

A disk that has gone away and a driver that hangs block whoever asks them, without a deadline. Here that is a thread
that nobody waits for: all others go on, and a value that is not read any more becomes unknown.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

EVERY_S = 10.0
STALE_S = 60.0

_T = TypeVar("_T")


class Sampled(Generic[_T]):
    """What `read` returned last: every `every_s` seconds, in a daemon thread. What it raises is logged once."""

    def __init__(
        self, name: str, read: Callable[[], _T], every_s: float = EVERY_S, stale_s: float = STALE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._name, self._read, self._every_s, self._stale_s, self._clock = name, read, every_s, stale_s, clock
        self._last: tuple[float, _T] | None = None  # replaced as a whole: nothing is locked
        self._stop = threading.Event()
        self._fails = False

    @property
    def value(self) -> _T | None:
        """The last one; None while there is none that is younger than `stale_s`."""
        last = self._last
        return None if last is None or self._clock() - last[0] > self._stale_s else last[1]

    def start(self) -> None:
        """Begin to read. Where no thread is to be had the value stays unknown, and the log says so."""
        try:
            threading.Thread(target=self._run, name=f"sample {self._name}", daemon=True).start()
        except RuntimeError as error:
            log.warning("%s cannot be read: %s", self._name, error)

    def stop(self) -> None:
        """Read no more. Does not wait for a thread that hangs."""
        self._stop.set()

    def sample(self) -> None:
        """Read it now, in this thread."""
        began = self._clock()  # an answer that took a minute says how it was a minute ago
        try:
            self._last = began, self._read()
        except Exception as error:
            if not self._fails:
                log.warning("%s cannot be read: %s", self._name, error)
            self._fails = True
        else:
            self._fails = False

    def _run(self) -> None:
        while not self._stop.is_set():
            self.sample()
            self._stop.wait(self._every_s)
