"""Active callers: counted by every worker into one count in Redis, and read by whoever shows it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from orchestrator import activity
from orchestrator.activity import Activity
from orchestrator.monitor.shared import Shared
from orchestrator.store import Store
from tests.redis import RealRedis

from .conftest import eventually, until
from .test_metrics import record


@asynccontextmanager
async def connected(server: RealRedis) -> AsyncIterator[Store]:
    store = Store(server.url, 2.0)
    running = asyncio.create_task(store.run())
    try:
        await until(lambda: store.up)
        yield store
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def counts(shared: Shared, low: int, high: int) -> bool:
    """Whether so many are active, once what was sent without waiting has arrived."""
    await shared.look()
    return shared.active_users is not None and low <= shared.active_users <= high


async def test_callers_are_counted_once_over_all_workers() -> None:
    """Two workers see overlapping callers: the count is that of different ones, about, for five minutes."""
    now = [6_000_000.0]
    with RealRedis() as server:
        async with connected(server) as store, connected(server) as other:
            workers = [Activity(store, lambda: now[0]), Activity(other, lambda: now[0])]
            for index in range(600):
                workers[index % 2].record(record(caller=f"k{index % 400}"))
            for worker in workers:
                worker._flush()
            shared = Shared(store, lambda: now[0])
            await eventually(lambda: counts(shared, 388, 412))
            assert shared.memory_bytes is not None and shared.memory_bytes > 100_000
            now[0] += 4 * 60
            await shared.look()
            assert shared.active_users is not None and shared.active_users > 380
            now[0] += 3 * 60
            await shared.look()
            assert shared.active_users == 0
            ttls = [await store.call("TTL", key) for key in await store.call("KEYS", "truthgpt:{users}:*")]
            assert ttls and all(0 < ttl <= activity.LIVES_S for ttl in ttls), "nothing of it stays"


async def test_without_redis_nobody_knows_and_nothing_is_lost() -> None:
    """While Redis is away the count is unknown; callers seen meanwhile are counted once it is back."""
    with RealRedis() as server:
        async with connected(server) as store:
            worker, shared = Activity(store), Shared(store)
            server.kill()
            await until(lambda: not store.up)
            worker.record(record(caller="a"))
            worker._flush()
            await shared.look()
            assert shared.active_users is None and shared.readings()["truthgpt_active_users"]() == {}
            server.start()
            await until(lambda: store.up)
            worker.record(record(caller="b"))
            worker._flush()
            await eventually(lambda: counts(shared, 2, 2))
            assert shared.figures()["active_users"] == 2


async def test_a_flood_of_callers_is_bounded() -> None:
    """Between two flushes no more than a bounded number of callers is remembered."""
    with RealRedis() as server:
        async with connected(server) as store:
            worker = Activity(store)
            for index in range(activity.MOST + 5000):
                worker.record(record(caller=str(index)))
            assert len(worker._seen) == activity.MOST
            worker._flush()
            assert worker._seen == set()
