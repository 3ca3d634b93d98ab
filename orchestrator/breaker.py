"""Circuit breakers, one a model: after some consecutive failures a model is left alone for a while.

    closed --failures--> open --time passes, or its heartbeat is back--> half open --first token--> closed
                          ^------------------- a failure --------------------'

A cancelled request counts as neither success nor failure. Each worker has its own breakers; what one finds out it
tells the others over Redis, and a worker without Redis decides alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.errors import BreakerOpen, TruthGPTError, UpstreamError, UpstreamUnavailable
from orchestrator.store import BREAKERS, EVENTS, Store, StoreAway, StoreError

log = logging.getLogger(__name__)

LONGEST_OPEN_S = 60.0
PROBING_RETRY_S = 1.0
CLOSED, HALF_OPEN, OPEN = "closed", "half_open", "open"


@dataclass
class Breaker:
    """One model's state; a pure machine, `now` in seconds of a monotonic clock."""

    threshold: int
    open_s: float
    failures: int = 0  # consecutive ones
    opened: int = 0  # times in a row that it opened without closing between
    until: float | None = None  # open before this moment, half open after it; None is closed
    probing: bool = False

    def state(self, now: float) -> str:
        if self.until is None:
            return CLOSED
        return OPEN if now < self.until else HALF_OPEN

    def enter(self, now: float) -> float:
        """0 when a request may pass, else the seconds after which to try again. Half open, one passes at a time."""
        state = self.state(now)
        if state == OPEN and self.until is not None:
            return self.until - now
        if state == HALF_OPEN:
            if self.probing:
                return PROBING_RETRY_S
            self.probing = True
        return 0.0

    def alive(self) -> None:
        """A first token came: whoever asked half open has shown that the model answers; one more failure reopens."""
        if self.until is not None:
            self.until, self.probing, self.failures = None, False, self.threshold - 1

    def succeed(self) -> None:
        self.until, self.probing, self.failures, self.opened = None, False, 0, 0

    def fail(self, now: float) -> None:
        self.failures += 1
        if self.probing or (self.until is None and self.failures >= self.threshold):
            self.trip(now)

    def trip(self, now: float) -> None:
        """Open, each time in a row for twice as long."""
        self.until = now + min(LONGEST_OPEN_S, self.open_s * 2**self.opened)
        self.opened, self.probing = min(self.opened + 1, 16), False

    def leave(self) -> None:
        """Cancelled: neither good nor bad, and the next one may probe."""
        self.probing = False

    def half_open(self, now: float) -> None:
        """The model is heard again: let one request try at once."""
        if self.until is not None:
            self.until = min(self.until, now)


class Guard:
    """One request's way through a breaker: entered it raises BreakerOpen or lets it through, and counts how it ends.

    `excused`: it was one server of the model that failed it, and another one is well.
    """

    __slots__ = ("_breakers", "_model", "_tries", "heard", "done", "excused")

    def __init__(self, breakers: Breakers, model: str) -> None:
        self._breakers, self._model = breakers, model
        self._tries = self.heard = self.done = self.excused = False

    def chunk(self, last: bool) -> None:
        """A part of the answer came."""
        if not self.heard:
            self.heard = True
            self._breakers.change(self._model, Breaker.alive)
        self.done = self.done or last

    def __enter__(self) -> Guard:
        self._tries = self._breakers.enter(self._model)
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        breakers, model = self._breakers, self._model
        if kind is None or (self.done and not issubclass(kind, (UpstreamUnavailable, UpstreamError))):
            breakers.change(model, Breaker.succeed)
        elif issubclass(kind, (UpstreamUnavailable, UpstreamError)) and not self.excused:
            breakers.change(model, breakers.failed)
        elif self._tries:
            # The caller left, or the request itself was wrong: that says nothing of the model, unless it had answered.
            breakers.change(model, Breaker.leave)


class Breakers:
    """Every model's breaker in this worker."""

    def __init__(
        self, threshold: int, open_s: float, store: Store | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._threshold, self._open_s, self._store, self._clock = threshold, open_s, store, clock
        self._breakers: dict[str, Breaker] = {}
        self._writing: set[asyncio.Task[None]] = set()
        if store is not None:
            store.subscribe(EVENTS, self._on_event)

    def state(self, model: str) -> str:
        """closed, half_open or open."""
        breaker = self._breakers.get(model)
        return CLOSED if breaker is None else breaker.state(self._clock())

    def states(self) -> dict[str, str]:
        return {model: self.state(model) for model in sorted(self._breakers)}

    def guard(self, model: str) -> Guard:
        """Lets one request through and counts how it ends; raises BreakerOpen where it is entered."""
        return Guard(self, model)

    def enter(self, model: str) -> bool:
        """Let one request through: whether it is the one that tries, half open. Raises BreakerOpen."""
        breaker = self._of(model)
        wait_s = breaker.enter(self._clock())
        if wait_s > 0:
            raise BreakerOpen(model, wait_s)
        return breaker.probing

    def failed(self, breaker: Breaker) -> None:
        breaker.fail(self._clock())

    def change(self, model: str, how: Callable[[Breaker], None]) -> None:
        """Change one breaker, and tell the other workers when its state became another."""
        breaker = self._of(model)
        before = breaker.until
        how(breaker)
        if breaker.until != before:
            self._tell(model, breaker)

    def heard_again(self, model: str) -> None:
        """A model that was away answers its heartbeat: an open breaker is half open now."""
        if model in self._breakers:
            self.change(model, lambda breaker: breaker.half_open(self._clock()))

    def forget(self, model: str) -> None:
        """A model was unloaded: what it refused meanwhile says nothing of the one that is loaded next."""
        if model in self._breakers:
            self.change(model, Breaker.succeed)

    def _of(self, model: str) -> Breaker:
        breaker = self._breakers.get(model)
        if breaker is None:
            breaker = self._breakers[model] = Breaker(self._threshold, self._open_s)
        return breaker

    def _tell(self, model: str, breaker: Breaker) -> None:
        now = self._clock()
        state = breaker.state(now)
        left_s = max(0.0, (breaker.until or now) - now)
        log.log(logging.WARNING if state == OPEN else logging.INFO, "the circuit breaker of %s is %s", model, state)
        if self._store is None:
            return
        fields = {"state": state, "failures": breaker.failures, "open_s": round(left_s, 3), "at": round(time.time(), 3)}
        event = {"event": "breaker", "model": model, "worker": self._store.worker, **fields}
        self._store.publish(EVENTS, json.dumps(event).encode())
        task = asyncio.get_running_loop().create_task(self._write(self._store, model, json.dumps(fields)))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write(self, store: Store, model: str, fields: str) -> None:
        try:
            await store.call("HSET", BREAKERS, model, fields)
        except (StoreAway, StoreError) as error:
            log.info("the breaker's state is not shown to others: %s", error)

    def _on_event(self, payload: bytes) -> None:
        try:
            event = json.loads(payload)
            kind, model = event["event"], str(event.get("model", ""))
            if kind == "breaker_reset":
                for name in [model] if model else list(self._breakers):
                    self._of(name).succeed()
            elif kind == "breaker" and self._store is not None and event["worker"] != self._store.worker:
                state, breaker = str(event["state"]), self._of(model)
                if state == HALF_OPEN and breaker.state(self._clock()) == CLOSED:
                    self._tell(model, breaker)  # it has not heard yet: the last word, also in Redis, is ours
                else:
                    self._hear(breaker, state, float(event["open_s"]))
        except (ValueError, KeyError, TypeError, AttributeError, TruthGPTError):
            log.warning("an event about breakers makes no sense")

    def _hear(self, breaker: Breaker, state: str, open_s: float) -> None:
        now = self._clock()
        if state == OPEN and breaker.state(now) != OPEN:
            breaker.trip(now)
            breaker.until = now + min(LONGEST_OPEN_S, max(0.0, open_s))
        elif state == HALF_OPEN:
            breaker.half_open(now)
        elif state == CLOSED:
            breaker.succeed()
