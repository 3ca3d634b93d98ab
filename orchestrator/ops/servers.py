"""Draining Triton servers: the mark in the registry that every worker of every replica obeys."""

from __future__ import annotations

import time
from typing import Any

import redis

from orchestrator.ops.keyring import swap
from orchestrator.store import REGISTRY

PREFIX = "drain:"


def drained(client: redis.Redis) -> dict[str, float]:
    """URL of each server that is drained, and since when, Unix time; 0 where nobody can tell."""
    found = {}
    for name, value in client.hscan_iter(REGISTRY, match=f"{PREFIX}*", count=500):
        text = value.decode("ascii", "replace")
        found[name.decode("utf-8", "replace").removeprefix(PREFIX)] = float(text) if text.isdigit() else 0.0
    return found


def drain(client: redis.Redis, url: str) -> bool:
    """Give this server nothing new; whether it got something before."""
    return _mark(client, url, str(int(time.time())))


def resume(client: redis.Redis, url: str) -> bool:
    """Give this server requests again; whether it got none before."""
    return _mark(client, url, None)


def _mark(client: redis.Redis, url: str, value: str | None) -> bool:
    while True:
        before: Any = client.hget(REGISTRY, PREFIX + url)
        if (before is None) == (value is None):
            return False
        if swap(client, PREFIX + url, before, value):
            return True
