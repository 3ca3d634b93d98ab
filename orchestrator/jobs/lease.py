"""Holding the lease of a run while it works."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

from orchestrator.jobs.ledger import LEASE_S, RENEW_S, Ledger

log = logging.getLogger(__name__)

RETRY_S = 1.0


class LeaseLost(Exception):
    """The lease has ended or is another's: nothing more may be done; `hint` says what happens now."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the lease of {name} is lost: Redis was away for too long, or another run has taken over")
        self.hint = "the job is done by whoever has the lease next"


def boottime() -> float:
    """Seconds that go on while the machine sleeps, as a lease in Redis does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """A context manager: a thread renews the lease until it is left. `since`: boottime() before it was asked for.

    A lease lasts at Redis from when the request reached it, so never shorter than is assumed here.
    """

    def __init__(
        self, ledger: Ledger, name: str, token: str, holder: str, since: float, lease_s: float = LEASE_S,
        renew_s: float = RENEW_S, clock: Callable[[], float] = boottime,
    ) -> None:  # fmt: skip
        self._ledger, self._name, self._token, self._holder = ledger, name, token, holder
        self._lease_s, self._renew_s, self._clock = lease_s, renew_s, clock
        self._until = since + lease_s
        self._lost = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease of {name}", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()

    @property
    def held(self) -> bool:
        """Whether nobody else can have the lease at this moment."""
        return not self._lost and self._clock() < self._until

    def check(self) -> None:
        """To be called before every step that cannot be taken back. Raises LeaseLost."""
        if not self.held:
            raise LeaseLost(self._name)

    def _renew(self) -> None:
        pause_s = self._renew_s
        while not self._end.wait(pause_s) and self.held:
            asked = self._clock()
            try:
                if self._ledger.renew(self._name, self._token, self._holder, self._lease_s):
                    self._until, pause_s = asked + self._lease_s, self._renew_s
                else:
                    self._lost = True
            except Exception as error:  # whatever the client raises: until the lease ends it is tried again
                log.debug("the lease of %s was not renewed: %s", self._name, error)
                pause_s = RETRY_S
