"""What doctor proves by using it: each proof holds on a sound Redis, fails on a broken one, and leaves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
import redis

from orchestrator.fleet import Member
from orchestrator.ops import proofs
from orchestrator.settings import Settings
from tests.orchestrator.fake_triton import FakeTriton
from tests.orchestrator.fleets import fakes
from tests.redis import RealRedis


@pytest.fixture(scope="module")
def server() -> Iterator[RealRedis]:
    with RealRedis() as server:
        yield server


def settings(**changes: object) -> Settings:
    return Settings.load(changes, {})


def test_cache_and_limits_are_proven_and_leave_nothing(server: RealRedis) -> None:
    """An answer is stored and found, a second request refused, and not a key of either stays."""
    assert proofs.cache(server.url, settings()) == "an answer was stored and found again"
    assert proofs.limits(server.url, settings()) == "a second request in a minute was refused"
    with redis.Redis.from_url(server.url) as client:
        assert client.keys("*") == []


def test_a_redis_that_keeps_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis with no room for an answer, or that does not answer at all, proves nothing."""
    with RealRedis("--maxmemory", "1", "--maxmemory-policy", "noeviction") as full:
        with pytest.raises(proofs.NotProven):
            proofs.cache(full.url, settings())
        with pytest.raises(proofs.NotProven):
            proofs.limits(full.url, settings())
        full.kill()
        monkeypatch.setattr(proofs, "TIMEOUT_S", 0.5)
        with pytest.raises(proofs.NotProven, match="more than"):
            proofs.cache(full.url, settings())


def test_the_breaker_trips_at_the_number_that_is_set() -> None:
    """It opens after as many failures as the settings say and is closed by the reset."""
    assert "opened at 3 failures" in proofs.breaker(settings(breaker_failures=3))


def test_the_sanitizer_does_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dangerous text is refused or removed; one that lets it through is found."""
    assert "refused" in proofs.sanitizer(settings(sanitize="reject"))
    assert "removed" in proofs.sanitizer(settings(sanitize="clean"))
    assert "not looked at" in proofs.sanitizer(settings(sanitize="off"))
    monkeypatch.setattr(proofs, "HOSTILE", "Hola")
    with pytest.raises(proofs.NotProven):
        proofs.sanitizer(settings(sanitize="reject"))


def test_several_servers_share_and_replace_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers get as many heartbeats, one is ejected and comes back; one that is away proves nothing, by name."""

    async def serve(count: int, prove: Callable[[list[FakeTriton]], str]) -> str:
        async with fakes(count) as those:
            return await asyncio.to_thread(prove, those)

    def prove(those: list[FakeTriton]) -> str:
        return proofs.balancing([fake.url for fake in those], settings())

    said = asyncio.run(serve(2, prove))
    assert said == "2 servers share the heartbeats of m; one was ejected and came back"
    monkeypatch.setattr(proofs, "BALANCING_S", 0.5)
    dead = FakeTriton()
    dead.port = 9  # the discard port: nobody listens
    with pytest.raises(proofs.NotProven, match="http://127.0.0.1:9 is down"):
        asyncio.run(serve(2, lambda those: prove([*those, dead])))


def test_servers_that_are_not_shared_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fleet that sends all to one server, or goes on asking one that failed, is no balancing."""

    async def serve() -> str:
        async with fakes(2) as those:
            return await asyncio.to_thread(proofs.balancing, [fake.url for fake in those], settings())

    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.fleet.fleet.least", lambda members: members[0])
        with pytest.raises(proofs.NotProven, match="of 6 heartbeats at once the servers got"):
            asyncio.run(serve())
    monkeypatch.setattr(Member, "fail", lambda self, began: True)
    with pytest.raises(proofs.NotProven, match="was ejected and asked all the same"):
        asyncio.run(serve())
