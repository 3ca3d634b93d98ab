"""Redis: the pool, its health, and the one place where key names are made.

Redis away never fails a request and never changes readiness: it is reported, and whoever uses it says what happens
without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import redis.asyncio
import redis.exceptions

from orchestrator.settings import mask_url

log = logging.getLogger(__name__)

PING_INTERVAL_S = 1.0


class Store:
    """One Redis. `timeout_s` bounds every call, connecting included."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = mask_url(url)
        self._timeout_s = timeout_s
        # No retries: a call past its deadline is a miss. The socket's time-outs free what a stalled server holds.
        self._redis = redis.asyncio.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=None
        )
        self.up = False

    async def run(self) -> None:
        """Ping every second until cancelled, then close the pool."""
        try:
            while True:
                up = await self.ping()
                if up != self.up:
                    log.log(
                        logging.INFO if up else logging.WARNING, "Redis %s %s", self.url, "is up" if up else "is away"
                    )
                self.up = up
                await asyncio.sleep(PING_INTERVAL_S)
        finally:
            self.up = False
            with contextlib.suppress(redis.exceptions.RedisError, OSError):  # closing a connection that is already gone
                await self._redis.aclose()

    async def ping(self) -> bool:
        """Whether Redis answers within the deadline."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return bool(await self._redis.ping())
        except (redis.exceptions.RedisError, OSError):  # TimeoutError is an OSError
            return False
