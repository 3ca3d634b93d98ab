import asyncio
import contextlib
from pathlib import Path

import psutil
import pytest
import redis.asyncio

from orchestrator.local import alias, redisserver
from orchestrator.local.process import Child
from orchestrator.local.redisserver import EmbeddedRedis

MAX_BYTES = 16 << 20


@pytest.mark.parametrize("name", ["home", "my home", "h#1?x%41", "é" * 60, "h" * 150])
async def test_redis_answers_at_its_url_whatever_the_home_is_called(tmp_path: Path, name: str):
    """Characters with a meaning in URLs, and paths too long for a socket in bytes, are no obstacle."""
    home = tmp_path / name
    server = EmbeddedRedis(home, max_bytes=MAX_BYTES)
    child = await server.start(home / "redis.log")
    client = redis.asyncio.Redis.from_url(server.url)
    try:
        assert await client.ping()
    finally:
        await client.aclose()
        await child.stop(5)
        alias.clear(home)


async def test_a_start_that_is_cancelled_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stop in the middle of a restart must not leave a Redis that nobody knows."""
    program = tmp_path / "slow-redis"
    program.write_text("#!/bin/sh\nexec sleep 60\n")  # starts and never answers
    program.chmod(0o700)
    monkeypatch.setattr(redisserver, "binary", lambda: program)
    starting = asyncio.create_task(EmbeddedRedis(tmp_path / "home", max_bytes=MAX_BYTES).start(tmp_path / "log"))
    children: list[psutil.Process] = []
    while not children:
        await asyncio.sleep(0.05)
        children = [p for p in psutil.Process().children() if "sleep" in p.cmdline()]
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


async def test_a_redis_that_ends_at_once_is_an_error_with_its_words(tmp_path: Path):
    """A damaged append-only file is named in the error instead of a time-out."""
    (tmp_path / "redis").mkdir()
    (tmp_path / "redis" / "appendonly.aof").write_bytes(b"no such format\n")
    with pytest.raises(TimeoutError, match="Bad file format"):
        await EmbeddedRedis(tmp_path, max_bytes=MAX_BYTES).start(tmp_path / "log")


async def test_a_full_cache_costs_neither_keys_nor_running_requests(tmp_path: Path):
    """Memory stays bounded; old answers make room, not keys without an end nor what was written a moment ago."""
    child, client = await started(tmp_path)
    answer = b"x" * 8192

    async def fill(name: str, count: int) -> None:
        pipeline = client.pipeline(transaction=False)
        for number in range(count):
            pipeline.set(f"{name}{number}", answer, ex=3600)
        await pipeline.execute()

    try:
        await client.hset("registry", "key:1", "{}")
        await fill("old", 2500)  # more than there is room for
        await asyncio.sleep(1.1)  # Redis tells ages in seconds
        for number in range(20):
            await client.set(f"lease{number}", "1", ex=30)
        await fill("new", 300)
        info = await client.info()
        assert info["evicted_keys"] > 500
        assert info["used_memory"] < MAX_BYTES * 1.1
        assert await client.exists("registry") == 1
        assert await client.exists(*(f"lease{number}" for number in range(20))) == 20
    finally:
        await client.aclose()
        await child.stop(5)


async def test_what_redis_knows_survives_a_kill(tmp_path: Path):
    """A key that was made and acknowledged is there after kill -9 and a new start."""
    child, client = await started(tmp_path)
    await client.hset("registry", "key:1", "{}")
    await child.kill()
    await client.aclose()
    child, client = await started(tmp_path)
    try:
        assert await client.hget("registry", "key:1") == b"{}"
    finally:
        await client.aclose()
        await child.stop(5)


async def started(home: Path) -> tuple[Child, redis.asyncio.Redis]:
    """The embedded server of this home, and a client of it."""
    server = EmbeddedRedis(home, max_bytes=MAX_BYTES)
    child = await server.start(home / "redis.log")
    return child, redis.asyncio.Redis.from_url(server.url)
