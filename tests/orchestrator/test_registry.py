"""Every worker's copy of keys and limits, against a real Redis that stalls, dies, comes back and loses messages."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis

from orchestrator import registry as module
from orchestrator.ops import servers
from orchestrator.ops.keyring import Keyring
from orchestrator.registry import Registry
from orchestrator.store import EVENTS, REGISTRY, REGISTRY_VERSION, Store
from tests.redis import RealRedis

from .conftest import until

PROMISE_S = 1.0  # a revocation holds everywhere within this


@pytest.fixture(scope="module")
def server() -> Iterator[RealRedis]:
    with RealRedis("--appendonly", "yes", "--appendfsync", "always") as running:
        yield running


@asynccontextmanager
async def workers(server: RealRedis, count: int = 1, grace_s: float = 300.0) -> AsyncIterator[list[Registry]]:
    """Registries that run, each with a store of its own, as in processes of their own; all agree at first."""
    stores = [Store(server.url, 0.5) for _ in range(count)]
    registries = [Registry(store, grace_s, {"summarization": 7}) for store in stores]
    tasks = [asyncio.create_task(run()) for run in [part.run for part in stores] + [part.run for part in registries]]
    try:
        await until(lambda: all(registry.fresh for registry in registries))
        yield registries
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def revoked(registry: Registry, id: str) -> bool:
    key = registry.key(id)
    return key is not None and key.state(time.time()) == "revoked"


async def test_a_revocation_reaches_every_worker_at_once(server: RealRedis, client: redis.Redis) -> None:
    """Two workers know a new key, and its revocation, by the announcement: much sooner than by a poll."""
    async with workers(server, 2) as both:
        keyring = Keyring(client)
        key, _ = await asyncio.to_thread(keyring.create, "acme")
        assert await until(lambda: all(each.key(key.id) for each in both)) < module.POLL_S / 2
        await asyncio.sleep(module.POLL_S / 5)  # not in the shadow of the copy just made
        await asyncio.to_thread(keyring.revoke, key.id)
        assert await until(lambda: all(revoked(each, key.id) for each in both)) < PROMISE_S


async def test_a_drained_server_is_known_to_every_worker(server: RealRedis, client: redis.Redis) -> None:
    """Its mark comes as a revocation does, and each worker is told when it has the new copy; so does its going."""
    url = "http://[fd00::1]:8000"
    async with workers(server, 2) as both:
        heard: list[set[str]] = []
        both[0].on_copy.append(lambda: heard.append(set(both[0].drained)))
        assert await asyncio.to_thread(servers.drain, client, url)
        assert await until(lambda: all(set(each.drained) == {url} for each in both)) < PROMISE_S
        assert await asyncio.to_thread(servers.resume, client, url)
        assert await until(lambda: all(not each.drained for each in both)) < PROMISE_S
        assert heard[0] == {url} and heard[-1] == set()
        assert not await asyncio.to_thread(servers.resume, client, url), "it was not drained"


async def test_a_lost_announcement_is_found_by_the_poll(server: RealRedis, client: redis.Redis) -> None:
    """A change that nobody announced holds in every worker within a second."""
    key, _ = Keyring(client).create("acme")
    async with workers(server, 2) as both:
        assert all(each.key(key.id) for each in both)
        record = json.loads(key.to_json()) | {"revoked": 1.0}
        client.hset(REGISTRY, f"key:{key.id}", json.dumps(record))
        client.incr(REGISTRY_VERSION)
        assert await until(lambda: all(revoked(each, key.id) for each in both)) < PROMISE_S


async def test_an_announcement_before_its_change_loses_nothing(server: RealRedis, client: redis.Redis) -> None:
    """When the announcement comes before the change can be read, the change holds within a second all the same."""
    key, _ = Keyring(client).create("acme")
    async with workers(server, 2) as both:
        client.publish(EVENTS, json.dumps({"event": "registry"}))
        await asyncio.sleep(0.1)
        record = json.loads(key.to_json()) | {"revoked": 1.0}
        client.hset(REGISTRY, f"key:{key.id}", json.dumps(record))
        client.incr(REGISTRY_VERSION)
        assert await until(lambda: all(revoked(each, key.id) for each in both)) < PROMISE_S


async def test_other_messages_change_nothing(server: RealRedis, client: redis.Redis) -> None:
    """Another event and nonsense on the channel are not taken for a change and break nothing."""
    async with workers(server) as (registry,):
        for payload in (b"\xff", b"[]", b"{}", b'{"event": "breaker"}'):
            client.publish(EVENTS, payload)
        key, _ = Keyring(client).create("acme")
        await until(lambda: registry.key(key.id) is not None)


async def test_a_stall_leaves_known_keys_for_the_grace(server: RealRedis, client: redis.Redis) -> None:
    """While Redis stalls keys stay known and the copy is soon not fresh; after the grace nothing is known any more."""
    key, _ = Keyring(client).create("acme")
    now = [1000.0]
    store = Store(server.url, 0.05)
    registry = Registry(store, 300.0, clock=lambda: now[0])
    tasks = [asyncio.create_task(part.run()) for part in (store, registry)]
    try:
        assert not registry.fresh and not registry.known and registry.key(key.id) is None
        await until(lambda: registry.key(key.id) is not None)
        server.stop_answering()
        await until(lambda: not store.up)
        now[0] += module.FRESH_S + 0.1
        assert not registry.fresh and registry.known and registry.key(key.id) is not None
        assert not await registry.refresh() and not registry.fresh
        now[0] = 1000.0 + 300.1
        assert not registry.known and registry.key(key.id) is None
        server.go_on()
        await until(lambda: registry.fresh)
        assert registry.key(key.id) is not None
    finally:
        server.go_on()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_restart_of_redis_keeps_keys(server: RealRedis, client: redis.Redis) -> None:
    """What was written before a crash of Redis is in its append-only file; what changes after it is seen again."""
    keyring = Keyring(client)
    key, _ = keyring.create("acme")
    async with workers(server) as (registry,):
        server.restart()
        assert keyring.get(key.id) == key and registry.key(key.id) == key
        keyring.revoke(key.id)
        await until(lambda: revoked(registry, key.id))


async def test_redis_that_came_back_empty_is_believed(server: RealRedis, client: redis.Redis) -> None:
    """The copy follows Redis, also where the version is the same for other contents."""
    Keyring(client).create("acme")
    async with workers(server) as (registry,):
        client.flushall()
        other, _ = Keyring(client).create("other")
        await until(lambda: registry.key(other.id) is not None)
        assert list(registry._copy.keys) == [other.id]


async def test_a_malformed_record_is_skipped_and_logged(
    server: RealRedis, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Records that make no sense are told once and hide none of the others."""
    key, _ = Keyring(client).create("acme")
    bad = {
        b"key:x": b"{",
        b"key:\xff": b"{}",
        b"limits:x": b'{"per_year": 1}',
        b"ttl:summarization": b"-5",
        b"what": b"",
    }
    client.hset(REGISTRY, mapping={**bad, b"ttl:translation": b"60", b"limits:y": b'{"per_day": 0}'})
    async with workers(server) as (registry,):
        await until(lambda: registry.ttl_of("translation") == 60)
        client.incr(REGISTRY_VERSION)
        await registry.refresh()
        assert registry.key(key.id) == key and registry.key("x") is None
        assert registry.limits_of("y") == {"per_day": 0} and registry.limits_of("x") == {}
        assert registry.ttl_of("summarization") == 7
        with pytest.raises(KeyError):
            registry.ttl_of("juggling")
    told = [record.getMessage() for record in caplog.records if "malformed" in record.getMessage()]
    assert len(told) == 4, told


async def test_a_redis_that_cannot_serve_is_not_agreement(server: RealRedis, client: redis.Redis) -> None:
    """An error instead of the records leaves the copy as it was and not fresh, until they can be read."""
    key, _ = Keyring(client).create("acme")
    async with workers(server) as (registry,):
        saved = client.dump(REGISTRY)
        assert isinstance(saved, bytes)
        client.set(REGISTRY, "no hash")
        client.incr(REGISTRY_VERSION)
        before = registry.fresh_at
        await asyncio.sleep(module.POLL_S + 0.1)
        assert not await registry.refresh() and registry.key(key.id) == key
        assert before is not None and registry.fresh_at is not None and registry.fresh_at - before < module.POLL_S
        client.restore(REGISTRY, 0, saved, replace=True)
        fresh_at = registry.fresh_at
        await until(lambda: registry.fresh_at != fresh_at)


async def test_ten_thousand_keys_do_not_hold_up_the_loop(
    server: RealRedis, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large registry is read in pieces: other tasks run after every few hundred records."""
    key, _ = Keyring(client).create("acme")
    client.hset(REGISTRY, mapping={f"key:id{number}": key.to_json() for number in range(10_000)})
    at_once = [0]  # records read between two turns of another task
    take = Registry._take

    def counting(self: Registry, *record: Any) -> None:
        at_once[-1] += 1
        take(self, *record)

    async def tick() -> None:
        while True:
            await asyncio.sleep(0)
            at_once.append(0)

    monkeypatch.setattr(Registry, "_take", counting)
    ticking = asyncio.create_task(tick())
    async with workers(server) as (registry,):
        assert len(registry._copy.keys) == 10_001
    ticking.cancel()
    assert sum(at_once) >= 10_001 and max(at_once) <= 2 * module.CHUNK  # HSCAN's count is a hint


async def test_without_redis_nothing_is_known() -> None:
    """A gateway without Redis has a registry that ends at once, and knows the default times to live only."""
    registry = Registry(None, 300.0, {"summarization": 7})
    await registry.run()
    assert not await registry.refresh() and not registry.known and registry.key("x") is None
    assert registry.ttl_of("summarization") == 7
