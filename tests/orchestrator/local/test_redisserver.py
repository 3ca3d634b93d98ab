import asyncio
import contextlib
from pathlib import Path

import psutil
import pytest
import redis.asyncio

from orchestrator.local import alias, redisserver
from orchestrator.local.redisserver import EmbeddedRedis


@pytest.mark.parametrize("name", ["home", "my home", "h#1?x%41", "é" * 60, "h" * 150])
async def test_redis_answers_at_its_url_whatever_the_home_is_called(tmp_path: Path, name: str):
    """Characters with a meaning in URLs, and paths too long for a socket in bytes, are no obstacle."""
    home = tmp_path / name
    server = EmbeddedRedis(home)
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
    starting = asyncio.create_task(EmbeddedRedis(tmp_path / "home").start(tmp_path / "log"))
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
        await EmbeddedRedis(tmp_path).start(tmp_path / "log")
