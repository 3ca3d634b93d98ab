"""`truthgpt breaker`, against a real Redis and a worker's real breakers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from orchestrator.breaker import Breakers
from orchestrator.errors import UpstreamUnavailable
from orchestrator.ops import breakers
from orchestrator.store import BREAKERS, Store
from tests.orchestrator.conftest import until
from tests.orchestrator.gateway import write_state
from tests.redis import RealRedis


@pytest.fixture
def server() -> Iterator[RealRedis]:
    with RealRedis() as running:
        yield running


@pytest.fixture
def deployment(place: Any, server: RealRedis) -> Any:
    write_state(place.home, "http://127.0.0.1:1", redis=server.url)
    return place


def test_show_tells_what_the_workers_said(deployment: Any, server: RealRedis) -> None:
    """An open breaker is shown with the time left, half open once that is over, and nonsense is left out."""
    assert deployment.json("breaker", "show") == {"breakers": {}}
    assert "no breaker has opened" in deployment.run("breaker", "show").stdout
    fields = {"state": "open", "failures": 5, "open_s": 5.0, "at": 1000.0}
    with redis.Redis.from_url(server.url) as client:
        client.hset(BREAKERS, mapping={"demo": json.dumps(fields), "other": "x", "third": "[]"})
        (soon,) = breakers.read(client, clock=lambda: 1003.0)
        (later,) = breakers.read(client, clock=lambda: 1006.0)
    assert (soon.model, soon.state, soon.open_s, soon.failures) == ("demo", "open", 2.0, 5)
    assert (later.state, later.open_s) == ("half_open", 0.0)
    assert deployment.json("breaker", "show")["breakers"]["demo"]["state"] == "half_open"
    assert deployment.run("breaker", "show").stdout.startswith("demo: half_open, 5 failures in a row")


async def test_reset_closes_it_in_every_worker(deployment: Any, server: RealRedis) -> None:
    """The named breaker, or all, is closed at once; without a gateway that hears it the command fails."""
    assert deployment.run("breaker", "reset").exit_code == 1
    store = Store(server.url, 0.5)
    those = Breakers(1, 30.0, store)
    task = asyncio.create_task(store.run())
    try:
        await until(lambda: store.up)
        for model in ("demo", "other"):
            with pytest.raises(UpstreamUnavailable), those.guard(model):
                raise UpstreamUnavailable
        assert those.states() == {"demo": "open", "other": "open"}
        done = await asyncio.to_thread(deployment.run, "breaker", "reset", "demo")
        assert (done.exit_code, "demo" in done.stdout) == (0, True), done.stderr
        await until(lambda: those.states() == {"demo": "closed", "other": "open"})
        assert (await asyncio.to_thread(deployment.json, "breaker", "reset"))["reset"] is None
        await until(lambda: those.states() == {"demo": "closed", "other": "closed"})
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
