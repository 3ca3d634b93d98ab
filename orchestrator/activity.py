"""How many callers are active: each worker adds those it has seen to a count in Redis that all replicas share.

HyperLogLog (Flajolet et al., 2007) counts distinct values in 12 KB to within 0.81 % standard error, and keeps none of
them. There is one for each minute; five of them and the current one are the active callers.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable

from orchestrator.domain import Record
from orchestrator.store import Script, Store, StoreAway, users_key

FLUSH_S = 5.0
LIVES_S = 420  # the five minutes that are looked back on, and some room for clocks that differ
AT_ONCE = 500  # callers in one command
MOST = 10_000  # that are remembered between two flushes: more would be counted a little later, or not at all

_ADD = Script("redis.call('PFADD', KEYS[1], unpack(ARGV, 2)) return redis.call('EXPIRE', KEYS[1], ARGV[1])")


class Activity:
    """A sink of requests' records; `run` tells Redis. Without Redis nobody is counted."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock
        self._seen: set[str] = set()

    def record(self, record: Record) -> None:
        if len(self._seen) < MOST:
            self._seen.add(record.caller)

    async def run(self) -> None:
        """Until cancelled, and once more then."""
        try:
            while True:
                await asyncio.sleep(FLUSH_S)
                self._flush()
        finally:
            self._flush()

    def _flush(self) -> None:
        key = users_key(int(self._clock() // 60))
        callers = iter(self._seen)
        try:
            while page := tuple(itertools.islice(callers, AT_ONCE)):
                self._store.script_only(_ADD, [key], [LIVES_S, *page], lazy=True)
        except StoreAway:  # they are added with the next ones
            return
        self._seen.clear()
