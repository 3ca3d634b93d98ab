"""`truthgpt tritons`, against a real Redis and a gateway that says which servers it has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from orchestrator.ops import servers
from tests.orchestrator.gateway import Gateway, write_state
from tests.redis import RealRedis

ONE, OTHER = "http://127.0.0.1:8000", "http://[fd00::5]:8000"


class Balancing(Gateway):
    """A gateway over two servers."""

    rows: Any = (
        {"url": ONE, "state": "ready", "outstanding": 3, "answered_s": 0.21},
        {"url": OTHER, "state": "ready", "outstanding": 0, "answered_s": None},
    )

    def health(self) -> dict[str, Any]:
        return super().health() | {"tritons": self.rows}


@pytest.fixture(scope="module")
def server() -> Iterator[RealRedis]:
    with RealRedis() as running:
        yield running


@pytest.fixture
def client(server: RealRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as connected:
        connected.flushall()
        yield connected


@pytest.fixture
def gateway(place: Any, server: RealRedis) -> Iterator[Balancing]:
    with Balancing() as running:
        write_state(place.home, running.url, redis=server.url)
        yield running


def states(gateway: Balancing, one: str, other: str) -> None:
    gateway.rows = [{**row, "state": state} for row, state in zip(gateway.rows, (one, other), strict=True)]


def audit(place: Any) -> list[str]:
    path = place.home / "audit" / "audit.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [f"{line['operation']} {line['detail']}" for line in lines if "tritons" in line.get("operation", "")]


def test_list(place: Any, gateway: Balancing, client: redis.Redis) -> None:
    """Each server with its state, requests and when it last answered; of the gateway that is named, if one is."""
    assert place.json("tritons", "list") == {"tritons": list(gateway.rows)}
    shown = place.run("tritons", "list").stdout
    assert shown.splitlines()[0].split() == ["URL", "STATE", "REQUESTS", "ANSWERED"]
    assert "0.2 s ago" in shown and "never" in shown and OTHER in shown
    place.set(HOME=place.home / "elsewhere")
    assert place.json("tritons", "list", "--url", gateway.url)["tritons"][0]["outstanding"] == 3
    place.refused("tritons", "list")
    gateway.rows = []
    assert "no Triton server is known" in place.run("tritons", "list", "--url", gateway.url).stdout
    gateway.rows = None
    assert "older version" in place.refused("tritons", "list", "--url", gateway.url)


@pytest.mark.parametrize("url", [OTHER, OTHER + "/", "http://[fd00:0::5]", "[fd00::5]:8000"])
def test_drain_and_resume(place: Any, gateway: Balancing, client: redis.Redis, url: str) -> None:
    """The mark is in the registry under the one spelling of the URL, and goes again; both are audited, once."""
    document = place.json("tritons", "drain", url)
    assert document == {"url": OTHER, "drained": True, "changed": True, "last": False}
    assert list(servers.drained(client)) == [OTHER] and servers.drained(client)[OTHER] > 1e9
    assert "was drained already" in place.run("tritons", "drain", url).stdout
    assert "takes requests again" in place.run("tritons", "resume", url).stdout
    assert servers.drained(client) == {}
    assert audit(place) == [f"tritons drain url={OTHER}", f"tritons resume url={OTHER}"]
    assert "drained: none" in place.refused("tritons", "resume", url)


def test_the_last_server_is_drained_only_with_force(place: Any, gateway: Balancing, client: redis.Redis) -> None:
    """One that nobody could take over for is kept, unless it is said that this is meant; one that is down is not."""
    states(gateway, "ready", "down")
    assert "last server that takes requests" in place.refused("tritons", "drain", ONE)
    assert servers.drained(client) == {}
    assert place.run("tritons", "drain", OTHER).exit_code == 0
    done = place.run("tritons", "drain", ONE, "--force")
    assert done.exit_code == 0 and "refused with 503" in done.stderr
    assert set(servers.drained(client)) == {ONE, OTHER} and "the last one" in audit(place)[-1]
    states(gateway, "ready", "draining")
    assert "last server" in place.refused("tritons", "drain", ONE)


def test_what_is_no_server_is_refused(place: Any, gateway: Balancing, client: redis.Redis) -> None:
    """A URL that the gateway does not have, with those that it has; and what is no URL, as wrong usage."""
    said = place.refused("tritons", "drain", "http://10.0.0.9:8000")
    assert ONE in said and OTHER in said
    for wrong in ("https://a", "http://a:99999", f"{ONE},{OTHER}", ""):
        place.refused("tritons", "drain", wrong, code=2)
    assert servers.drained(client) == {}
    client.hset("truthgpt:{registry}", "drain:http://10.0.0.9:8000", "nonsense")
    assert servers.drained(client) == {"http://10.0.0.9:8000": 0.0}
    assert place.run("tritons", "resume", "10.0.0.9").exit_code == 0, "also one that has left"


def test_without_redis_nothing_is_drained(place: Any, gateway: Balancing) -> None:
    """Whoever cannot write the mark is told so."""
    write_state(place.home, gateway.url, redis="redis://127.0.0.1:1")
    assert "Redis at" in place.refused("tritons", "drain", ONE)
