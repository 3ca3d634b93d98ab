"""The Redis that commands write to: the running stack's, else the one of the settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from orchestrator.local import state
from orchestrator.settings import Settings, mask_url

TIMEOUT_S = 5.0


class NoRedis(Exception):
    """There is no Redis to ask, or it does not answer; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@contextmanager
def connect(settings: Settings) -> Iterator[redis.Redis]:
    """A connected client, replies as bytes. Raises NoRedis when there is none and whenever Redis fails inside."""
    found = state.read(settings.home)
    url = found.redis if found is not None and found.running else settings.redis_url
    if url is None:
        raise NoRedis(
            f"no stack is running from {settings.home}, and no Redis is set",
            "start the stack with `truthgpt up --detach`, or set TRUTHGPT_REDIS_URL",
        )
    with connect_to(url) as client:
        yield client


@contextmanager
def connect_to(url: str) -> Iterator[redis.Redis]:
    """A client of this Redis, as `connect` gives one."""
    what = f"Redis at {mask_url(url)}"
    retry = Retry(NoBackoff(), 0)  # a write that was sent and not answered must not be sent again
    try:
        client = redis.Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=retry)
    except ValueError as error:
        raise NoRedis(f"{what} cannot be asked: {error}", "correct TRUTHGPT_REDIS_URL") from error
    with client:
        try:
            client.ping()
            yield client
        except redis.RedisError as error:
            hint = "`truthgpt doctor` looks for the cause"
            raise NoRedis(f"{what} failed: {str(error) or type(error).__name__}", hint) from error
