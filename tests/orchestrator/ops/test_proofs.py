"""What doctor proves by using it: each proof holds on a sound Redis, fails on a broken one, and leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from orchestrator.ops import proofs
from orchestrator.settings import Settings
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
