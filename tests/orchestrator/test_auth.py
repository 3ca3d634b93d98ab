"""Who is asking, in both modes, while Redis answers, while it is away and long after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import redis

from orchestrator import keys, registry
from orchestrator.auth import Auth
from orchestrator.domain import Caller, Limits
from orchestrator.errors import KeysUnavailable, PermissionDenied, TruthGPTError, Unauthenticated
from orchestrator.ops.keyring import Keyring
from orchestrator.registry import Registry
from orchestrator.store import Store
from tests.redis import RealRedis

from .conftest import until

DEFAULTS = Limits(per_minute=60, per_hour=1000)
GRACE_S = 300.0


@pytest.fixture
def keyring(server: RealRedis) -> Iterator[Keyring]:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        yield Keyring(client)


@dataclass
class Clock:
    """Monotonic and Unix seconds, set by hand."""

    mono: float = 50.0
    unix: float = 0.0


@asynccontextmanager
async def copied(server: RealRedis, clock: Clock) -> AsyncIterator[Registry]:
    """A registry that agreed with Redis at the clock's time, and nobody asks again; Redis is up."""
    store = Store(server.url, 0.5)
    task = asyncio.create_task(store.run())
    try:
        await until(lambda: store.up)
        found = Registry(store, GRACE_S, clock=lambda: clock.mono)
        assert await found.refresh()
        yield found
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def fault(function: Callable[..., Caller], *args: str | None) -> TruthGPTError:
    with pytest.raises(TruthGPTError) as caught:
        function(*args)
    return caught.value


async def test_keys_mode_takes_valid_keys_only(server: RealRedis, keyring: Keyring) -> None:
    """A valid key is its caller; none, an unknown, wrong, expired or revoked one are refused with the same text."""
    key, good = keyring.create("acme", limits={"per_minute": 5})
    _, admin = keyring.create("ops", scope="admin")
    expiring, expired = keyring.create("acme", expires_s=10.0)
    revoked_key, revoked = keyring.create("acme")
    keyring.revoke(revoked_key.id)
    other = keys.credential(key.id, keys.new_secret())
    unknown = keys.credential(keys.new_id(), keys.new_secret())
    clock = Clock(unix=(expiring.expires or 0.0) - 1.0)
    async with copied(server, clock) as found:
        auth = Auth("keys", found, DEFAULTS, lambda: clock.unix)
        assert auth.caller(good, "192.0.2.1") == Caller(
            key.id, "acme", "inference", Limits(per_minute=5, per_hour=1000)
        )
        assert auth.caller(admin, "").scope == "admin" and auth.caller(expired, "").id == expiring.id
        clock.unix += 1.0
        faults = [fault(auth.caller, c, "192.0.2.1") for c in (None, "", unknown, other, expired, revoked, good[:-1])]
        assert {type(each) for each in faults} == {Unauthenticated}
        assert {(each.text.en, each.text.es) for each in faults} == {
            (Unauthenticated().text.en, Unauthenticated().text.es)
        }
        details = [str(each) for each in faults]
        assert f"key {expiring.id} is expired" in details and f"key {revoked_key.id} is revoked" in details
        secrets = [credential.split("_", 2)[2] for credential in (unknown, other, expired, revoked)]
        assert not any(secret in detail for secret in secrets for detail in details)


async def test_an_outage_is_known_at_once(server: RealRedis, keyring: Keyring) -> None:
    """An unknown key is 401 while Redis answers and 503 from the moment it was found not to."""
    unknown = keys.credential(keys.new_id(), keys.new_secret())
    store = Store(server.url, 0.1)
    tasks = [asyncio.create_task(store.run())]
    found = Registry(store, GRACE_S)
    tasks.append(asyncio.create_task(found.run()))
    auth = Auth("keys", found, DEFAULTS)
    try:
        await until(lambda: found.fresh)
        assert type(fault(auth.caller, unknown, "")) is Unauthenticated
        server.stop_answering()
        assert await until(lambda: not store.up) < registry.FRESH_S
        assert type(fault(auth.caller, unknown, "")) is KeysUnavailable
        server.go_on()
        await until(lambda: found.fresh)
        assert type(fault(auth.caller, unknown, "")) is Unauthenticated
    finally:
        server.go_on()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_outage_keeps_known_keys_for_the_grace(server: RealRedis, keyring: Keyring) -> None:
    """With Redis away known keys work and unknown ones are 503, never 401; after the grace all are 503."""
    key, good = keyring.create("acme")
    revoked_key, revoked = keyring.create("acme")
    keyring.revoke(revoked_key.id)
    strange = [keys.credential(keys.new_id(), keys.new_secret()), keys.credential(key.id, keys.new_secret()), "none"]
    clock = Clock()
    async with copied(server, clock) as found:
        auth = Auth("keys", found, DEFAULTS)
        clock.mono += registry.FRESH_S + 0.1
        assert auth.caller(good, "").id == key.id
        assert [type(fault(auth.caller, credential, "")) for credential in strange] == [KeysUnavailable] * 3
        assert type(fault(auth.caller, revoked, "")) is type(fault(auth.caller, None, "")) is Unauthenticated
        clock.mono = 50.0 + GRACE_S + 0.1
        for credential in (good, revoked, *strange):
            assert type(fault(auth.caller, credential, "")) is KeysUnavailable
            assert type(fault(auth.admin, credential)) is KeysUnavailable


async def test_before_redis_was_ever_seen_no_key_is_judged() -> None:
    """A gateway that starts while Redis is away says 503 to every key, and 401 to none at all."""
    auth = Auth("keys", Registry(None, GRACE_S), DEFAULTS)
    credential = keys.credential(keys.new_id(), keys.new_secret())
    assert type(fault(auth.caller, credential, "")) is type(fault(auth.admin, credential)) is KeysUnavailable
    assert type(fault(auth.caller, None, "")) is type(fault(auth.admin, None)) is Unauthenticated
    assert Auth("open", Registry(None, GRACE_S), DEFAULTS).caller(credential, "192.0.2.1").id == "ip-192.0.2.1"


async def test_open_mode_knows_callers_by_address(server: RealRedis, keyring: Keyring) -> None:
    """Without a key, or with a text that is none, the address is the caller; a valid key is its own caller."""
    key, good = keyring.create("acme")
    revoked_key, revoked = keyring.create("acme")
    keyring.revoke(revoked_key.id)
    keyring.set_limits("ip-2001:db8::1", {"per_minute": 0})
    async with copied(server, Clock()) as found:
        auth = Auth("open", found, DEFAULTS)
        unknown = keys.credential(keys.new_id(), keys.new_secret())
        for credential in (None, "", "none", unknown):
            assert auth.caller(credential, "::ffff:192.0.2.1") == Caller("ip-192.0.2.1", "open", "inference", DEFAULTS)
        assert auth.caller(None, "2001:DB8::1").limits == Limits(per_minute=0, per_hour=1000)
        assert auth.caller(good, "192.0.2.1") == Caller(key.id, "acme", "inference", DEFAULTS)
        # A key that was taken from its owner is no way to become a stranger with limits of one's own.
        for credential in (revoked, keys.credential(key.id, keys.new_secret())):
            assert type(fault(auth.caller, credential, "192.0.2.1")) is Unauthenticated


@pytest.mark.parametrize("mode", ["open", "keys"])
async def test_the_admin_surface_wants_an_admin(server: RealRedis, keyring: Keyring, mode: str) -> None:
    """Only a key of the scope admin is let in, in open mode too; a valid other key is 403, anything else 401."""
    admin_key, admin = keyring.create("ops", scope="admin", limits={"per_day": 9})
    _, good = keyring.create("acme")
    async with copied(server, Clock()) as found:
        auth = Auth(mode, found, DEFAULTS)
        assert auth.admin(admin) == Caller(admin_key.id, "ops", "admin", Limits(60, 1000, 9))
        assert type(fault(auth.admin, good)) is PermissionDenied
        for credential in (None, "", "none", keys.credential(keys.new_id(), keys.new_secret())):
            assert type(fault(auth.admin, credential)) is Unauthenticated


async def test_limits_come_from_the_nearest_that_sets_them(server: RealRedis, keyring: Keyring) -> None:
    """What was set for the caller goes before the key's own, field by field, and these before the defaults."""
    key, good = keyring.create("acme", limits={"per_minute": 5, "per_day": 50, "concurrency": 2})
    keyring.set_limits(key.id, {"per_minute": 7, "concurrency": 0})
    async with copied(server, Clock()) as found:
        auth = Auth("keys", found, DEFAULTS)
        assert auth.caller(good, "").limits == Limits(per_minute=7, per_hour=1000, per_day=50, concurrency=0)


async def test_a_rotated_key_keeps_its_caller(server: RealRedis, keyring: Keyring) -> None:
    """Both secrets are the same caller during the grace, only the new one after it."""
    key, old = keyring.create("acme")
    rotated, new = keyring.rotate(key.id, grace_s=60.0)
    clock = Clock(unix=rotated.old_until - 1.0)
    async with copied(server, clock) as found:
        auth = Auth("keys", found, DEFAULTS, lambda: clock.unix)
        assert auth.caller(old, "") == auth.caller(new, "") and auth.caller(new, "").id == key.id
        clock.unix += 1.0
        assert auth.caller(new, "").id == key.id and type(fault(auth.caller, old, "")) is Unauthenticated
