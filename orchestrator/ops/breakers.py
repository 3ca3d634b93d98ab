"""Circuit breakers as the workers last said, and the event that closes them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import redis

from orchestrator.store import BREAKERS, EVENTS


@dataclass(frozen=True)
class State:
    """One model's breaker. `open_s`: seconds until an open one lets a request try; `at`: Unix time of the change."""

    model: str
    state: str  # closed, half_open or open
    failures: int
    open_s: float
    at: float


def read(client: redis.Redis, clock: Callable[[], float] = time.time) -> list[State]:
    """Every breaker that has ever changed, by model."""
    found = []
    for name, value in client.hgetall(BREAKERS).items():
        try:
            fields = json.loads(value)
            model = name.decode() if isinstance(name, bytes) else name
            at = float(fields["at"])
            left_s = max(0.0, at + float(fields["open_s"]) - clock())
            state = "half_open" if fields["state"] == "open" and left_s == 0 else str(fields["state"])
            found.append(State(model, state, int(fields["failures"]), round(left_s, 3), at))
        except (ValueError, KeyError, TypeError):  # of another version: whatever it means, no worker is bound by it
            continue
    return sorted(found, key=lambda state: state.model)


def reset(client: redis.Redis, model: str | None) -> int:
    """Close one model's breaker, or all, in every worker; how many workers' connections heard it."""
    event = {"event": "breaker_reset", **({} if model is None else {"model": model})}
    if model is None:
        client.delete(BREAKERS)
    else:
        client.hdel(BREAKERS, model)
    return int(client.publish(EVENTS, json.dumps(event)))
