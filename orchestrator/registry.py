"""Each worker's own copy of what is written once for all: keys, limits of a caller, times to live, drained servers.

A change is announced on a channel; whoever missed that sees the version change within `POLL_S`. So a revocation holds
everywhere within a second while Redis answers, and no request ever asks Redis who its caller is.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from orchestrator import keys
from orchestrator.keys import Key, PartialLimits
from orchestrator.store import EVENTS, REGISTRY, REGISTRY_VERSION, Store, StoreAway, StoreError

log = logging.getLogger(__name__)

POLL_S = 0.5
FRESH_S = 1.5  # a copy that agreed this lately agrees now: two polls, and some room for a busy process
CHUNK_S = 0.3  # for a reply with a chunk: nobody waits for it, and it is larger than a request's
CHUNK = 256  # records read, and parsed, without letting go of the loop: about 2 ms
REST_S = 0.2  # between two copies of a large registry that changes all the time


@dataclass
class _Copy:
    keys: dict[str, Key] = field(default_factory=dict)
    limits: dict[str, PartialLimits] = field(default_factory=dict)
    ttls: dict[str, int] = field(default_factory=dict)
    drained: set[str] = field(default_factory=set)


class Registry:
    """The copy of one process. `grace_s`: how long it is good after Redis went away. Without a store nothing is known.

    `ttls` are the times to live in seconds of the tasks for which none is set. `clock` tells monotonic seconds.
    """

    def __init__(
        self,
        store: Store | None,
        grace_s: float,
        ttls: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._grace_s, self._ttls, self._clock = store, grace_s, ttls or {}, clock
        self._copy = _Copy()
        self._version: object = None
        self._malformed: set[bytes] = set()
        self._wake, self._copied = asyncio.Event(), asyncio.Event()
        self._changed = True
        self.on_copy: list[Callable[[], None]] = []  # called whenever everything was copied anew
        self.fresh_at: float | None = None  # when the copy was last known to agree with Redis

    @property
    def fresh(self) -> bool:
        """Whether Redis answers and the copy agrees with it, so that a key that is not in it does not exist."""
        return self._store is not None and self._store.up and self._age() <= FRESH_S

    @property
    def known(self) -> bool:
        """Whether the copy may be relied on: it agrees, or Redis has not been away for longer than the grace."""
        return self._age() <= max(FRESH_S, self._grace_s)

    def key(self, id: str) -> Key | None:
        """The key with this id in whatever state, None when there is none or nothing is known."""
        return self._copy.keys.get(id) if self.known else None

    def limits_of(self, subject: str) -> PartialLimits:
        """The limits that were set for a key id or address by themselves; the last ones known, however old."""
        return self._copy.limits.get(subject, {})

    def ttl_of(self, task: str) -> int:
        """Seconds that an answer of this task lives in the cache. Raises KeyError for a task that nobody knows."""
        return self._copy.ttls[task] if task in self._copy.ttls else self._ttls[task]

    @property
    def drained(self) -> Collection[str]:
        """URLs of the Triton servers that an operator has drained; the last ones known, however old."""
        return self._copy.drained

    async def run(self) -> None:
        """Keep the copy in agreement until cancelled; returns at once without a store."""
        if self._store is None:
            return
        unsubscribe = self._store.subscribe(EVENTS, self._on_event)
        self._store.on_up.append(self._announced)
        try:
            while True:
                self._wake.clear()
                began = self._clock()
                copied = await self.refresh()
                if copied:
                    await asyncio.sleep(min(REST_S, self._clock() - began))
                try:
                    async with asyncio.timeout(POLL_S):
                        await self._wake.wait()
                except TimeoutError:  # nothing was announced, or the announcement was lost
                    continue
        finally:
            self._store.on_up.remove(self._announced)
            unsubscribe()

    async def refresh(self) -> bool:
        """Ask Redis once; whether everything was copied anew. Redis away is no error: the copy grows old."""
        if self._store is None:
            return False
        began, changed = self._clock(), self._changed
        try:
            # The version is read first: what is written while the copy is made raises it and is seen by the next poll.
            version = await self._store.call("GET", REGISTRY_VERSION)
            copying = changed or version != self._version or self.fresh_at is None
            if copying:
                self._changed = False
                self._copy = await self._read(self._store)
                self._version = version
        except StoreAway:
            self._changed = self._changed or changed
            return False
        except StoreError as error:  # it answers and cannot serve, as while it loads its file
            self._changed = self._changed or changed
            log.warning("the registry cannot be read: %s", error)
            return False
        self.fresh_at = began
        self._copied.set()
        for call in self.on_copy if copying else ():
            call()
        return copying

    async def first_copy(self, timeout_s: float) -> bool:
        """Wait for the first copy; whether it came in time."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._copied.wait()
        except TimeoutError:
            return False

    async def _read(self, store: Store) -> _Copy:
        copy, cursor = _Copy(), b"0"
        while True:
            cursor, found = await store.call("HSCAN", REGISTRY, cursor, "COUNT", CHUNK, timeout_s=CHUNK_S)
            for name, value in zip(found[::2], found[1::2], strict=True):
                self._take(copy, name, value)
            if cursor == b"0":
                return copy

    def _take(self, copy: _Copy, name: bytes, value: bytes) -> None:
        kind, _, id = name.decode("utf-8", "replace").partition(":")
        try:
            if kind == "key":
                copy.keys[id] = keys.read(id, value)
            elif kind == "limits":
                copy.limits[id] = keys.read_limits(value)
            elif kind == "ttl":
                copy.ttls[id] = _seconds(value)
            elif kind == "drain":
                copy.drained.add(id)
        except ValueError as error:
            if name not in self._malformed:  # told once, not with every copy
                log.error("%r in the registry is malformed and counts as missing: %s", name, error)
                self._malformed.add(name)

    def _age(self) -> float:
        return float("inf") if self.fresh_at is None else self._clock() - self.fresh_at

    def _on_event(self, payload: bytes) -> None:
        try:
            event = json.loads(payload)
        except ValueError:
            log.warning("an event that is not JSON was ignored")
            return
        if isinstance(event, dict) and event.get("event") == "registry":
            self._announced()

    def _announced(self) -> None:
        """Redis is back, or something was changed: all is read again, whatever the version says."""
        self._changed = True
        self._wake.set()


def _seconds(value: bytes) -> int:
    if not value.isdigit() or len(value) > 9:
        raise ValueError("not a number of seconds")
    return int(value)
