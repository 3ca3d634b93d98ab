"""What only Redis knows, for all replicas: how many callers are active, and how much memory it uses itself."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

from orchestrator.metrics import Reading
from orchestrator.store import Store, StoreAway, StoreError, users_key

LOOK_S = 10.0
AWAY_S = 1.0  # while Redis is away, or not yet there
MINUTES = 5  # that active callers are looked back on, beside the one that has begun


class Shared:
    """`run` asks every LOOK_S. What nobody can tell is None."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock
        self.active_users: int | None = None
        self.memory_bytes: int | None = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S if self.active_users is not None else AWAY_S)

    async def look(self) -> None:
        """Ask once. Redis away is no error."""
        minute = int(self._clock() // 60)
        keys = [users_key(each) for each in range(minute - MINUTES, minute + 1)]
        try:
            self.active_users = int(await self._store.call("PFCOUNT", *keys))
            found = re.search(rb"(?m)^used_memory:(\d+)", await self._store.call("INFO", "memory"))
            self.memory_bytes = None if found is None else int(found[1])
        except (StoreAway, StoreError):
            self.active_users = self.memory_bytes = None

    def readings(self) -> dict[str, Reading]:
        """See metrics_table.py."""
        return {
            "truthgpt_active_users": lambda: _one(self.active_users),
            "truthgpt_redis_memory_usage_bytes": lambda: _one(self.memory_bytes),
        }

    def figures(self) -> dict[str, Any]:
        """Its part of the summary."""
        return {"active_users": self.active_users, "redis_memory_bytes": self.memory_bytes}


def _one(value: int | None) -> dict[tuple[str, ...], float]:
    return {} if value is None else {(): float(value)}
