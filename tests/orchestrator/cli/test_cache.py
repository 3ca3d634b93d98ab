"""`truthgpt cache` on a real Redis that the cache's own scripts have filled."""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis

from orchestrator.cache import DEFAULT_TTL_S, ENTER, LEAVE, Answer, Ticket, encode
from orchestrator.domain import CachePolicy
from orchestrator.store import EVENTS, REGISTRY, REGISTRY_VERSION
from tests.orchestrator.gateway import write_state
from tests.redis import RealRedis

SAID = "what the model said"


@pytest.fixture
def deployment(place: Any, server: RealRedis, client: redis.Redis) -> Any:
    """A place whose running stack has this Redis."""
    write_state(place.home, "http://127.0.0.1:1", redis=server.url)
    return place


def ask(client: redis.Redis, key: str, tenant: str = "t", task: str = "translation", model: str = "demo") -> str:
    """One request as the gateway makes it, with its answer stored after a miss; what the cache said."""
    wanted = Ticket(key, tenant, model, task)
    said: Any = client.eval(ENTER.text, 3, *wanted.keys(), wanted.args("w"))
    if said[0] == b"lead":
        entry = encode(Answer(SAID + "\x1b[2J", "stop", 1, 2), model, task)
        client.eval(LEAVE.text, 3, *wanted.keys(), "w", entry, 100_000, "")
    return str(said[0].decode())


def test_stats(deployment: Any, client: redis.Redis) -> None:
    """--json is the promised six figures, over tenants; people see a row a task."""
    assert deployment.json("cache", "stats") == {
        "hits": 0, "misses": 0, "hit_rate": 0.0, "evictions": 0, "entries": 0, "bytes": 0,
    }  # fmt: skip
    assert [ask(client, *of) for of in (("a", "t"), ("a", "t"), ("a", "u"), ("b", "t"))] == [
        "lead",
        "hit",
        "lead",
        "lead",
    ]
    off = Ticket("c", "t", "demo", "translation", CachePolicy(store=False))
    client.eval(ENTER.text, 3, *off.keys(), off.args("w"))
    found = deployment.json("cache", "stats")
    size = sum(client.strlen(key) for key in client.keys("truthgpt:*:c:*"))
    assert list(found.items()) == [
        ("hits", 1), ("misses", 3), ("hit_rate", 0.25), ("evictions", 0), ("entries", 3), ("bytes", size),
    ]  # fmt: skip
    shown = deployment.run("cache", "stats").stdout
    assert any(line.split() == ["translation", "1", "3", "1", "0"] for line in shown.splitlines())
    assert "hit rate 25.0%, 3 entries" in shown


def test_evictions_are_those_of_redis(deployment: Any) -> None:
    """A Redis that had to make room says so."""
    with RealRedis("--maxmemory", "3mb", "--maxmemory-policy", "volatile-lru") as small:
        write_state(deployment.home, "http://127.0.0.1:1", redis=small.url)
        with redis.Redis.from_url(small.url) as client:
            for number in range(60):
                client.set(f"truthgpt:{{t}}:c:{number:02x}", b"x" * 100_000, ex=1000)
        found = deployment.json("cache", "stats")
    assert found["evictions"] > 0 and found["evictions"] + found["entries"] == 60


def test_more_entries_than_a_page(deployment: Any, client: redis.Redis) -> None:
    """Whatever there is is counted once, listed up to the limit and removed."""
    with client.pipeline(transaction=False) as pipeline:
        for number in range(1200):
            pipeline.set(f"truthgpt:{{t}}:c:{number:04x}", encode(Answer("a", "stop", 1, 1), "demo", "translation"))
        pipeline.execute()
    assert deployment.json("cache", "stats")["entries"] == 1200
    assert len(deployment.json("cache", "inspect")) == 50
    assert len(deployment.json("cache", "inspect", "--limit", "1000")) == 1000
    assert deployment.json("cache", "clear", "--yes") == {"removed": 1200}
    assert client.dbsize() == 0


def test_clear_takes_what_it_is_told(deployment: Any, client: redis.Redis) -> None:
    """By tenant, by model, by both, or all; counters, keys and other names stay."""
    client.set("truthgpt:{t}:l:c", "limits")
    for tenant in ("t", "tt"):
        for model in ("demo", "demo2"):
            ask(client, f"{tenant}{model}", tenant, model=model)
    assert deployment.json("cache", "clear", "--tenant", "t", "--model", "demo", "--yes") == {"removed": 1}
    assert "removed 2 entries" in deployment.run("cache", "clear", "--tenant", "tt", "--yes").stdout
    assert deployment.json("cache", "clear", "--model", "demo", "--yes") == {"removed": 0}
    assert deployment.json("cache", "clear", "--model", "demo2", "--yes") == {"removed": 1}
    assert set(client.keys()) == {b"truthgpt:{t}:l:c", b"truthgpt:{t}:s", b"truthgpt:{tt}:s"}
    assert deployment.json("cache", "stats")["misses"] == 4


def test_inspect_shows_no_text_unless_told(deployment: Any, client: redis.Redis) -> None:
    """Task, model, age, life and size; the answer with --show-text, without what would move a terminal's cursor."""
    ask(client, "ab12", "acme")
    ask(client, "cd34")
    row = deployment.json("cache", "inspect", "ab")[0]
    assert list(row) == ["key", "tenant", "task", "model", "age_s", "ttl_s", "bytes"]
    assert (row["key"], row["tenant"], row["task"], row["model"]) == ("ab12", "acme", "translation", "demo")
    assert 0 <= row["age_s"] < 50 < row["ttl_s"] <= 100 and row["bytes"] == client.strlen("truthgpt:{acme}:c:ab12")
    listed = deployment.run("cache", "inspect").stdout
    assert "ab12" in listed and "cd34" in listed and SAID not in listed + json.dumps(row)
    shown = deployment.run("cache", "inspect", "ab12", "--show-text").stdout
    assert SAID in shown and "\x1b" not in shown
    assert deployment.json("cache", "inspect", "ab12", "--show-text")[0]["text"] == SAID + "\x1b[2J"


def test_inspect_of_what_is_not_there(deployment: Any, client: redis.Redis) -> None:
    """No such key fails, an empty cache does not; a pattern is no key; damaged bytes are shown as such."""
    assert deployment.json("cache", "inspect") == []
    assert "no entry's key begins with ab" in deployment.refused("cache", "inspect", "ab")
    assert "0-9 a-f" in deployment.refused("cache", "inspect", "*", code=2)
    client.set("truthgpt:{t}:c:ff", b"\x00\xff" * 300)
    row = deployment.json("cache", "inspect", "ff", "--show-text")[0]
    assert (row["task"], row["model"], row["age_s"], row["text"], row["bytes"]) == (None, None, None, None, 600)
    assert "?" in deployment.run("cache", "inspect", "--show-text").stdout


def test_ttl_shows_and_sets(deployment: Any, client: redis.Redis) -> None:
    """What is set is in the registry, announced to every worker, and shown from then on."""
    assert deployment.json("cache", "ttl") == DEFAULT_TTL_S
    with client.pubsub(ignore_subscribe_messages=True) as heard:
        heard.subscribe(EVENTS)
        assert heard.get_message(timeout=1.0) is None
        assert deployment.json("cache", "ttl", "translation", "60") == {"translation": 60}
        message = heard.get_message(timeout=1.0)
    assert message is not None and json.loads(message["data"]) == {"event": "registry"}
    assert client.hget(REGISTRY, "ttl:translation") == b"60" and client.get(REGISTRY_VERSION) == b"1"
    assert deployment.json("cache", "ttl") == DEFAULT_TTL_S | {"translation": 60}
    assert deployment.run("cache", "ttl", "translation").stdout.split() == ["TASK", "SECONDS", "translation", "60"]


def test_ttl_refuses_nonsense(deployment: Any) -> None:
    """Unknown tasks, no time and years are wrong usage."""
    for arguments in (("dreaming",), ("translation", "0"), ("translation", "99999999"), ("translation", "--adapt")):
        deployment.refused("cache", "ttl", *arguments, code=2)


def test_ttl_adapts_to_use(deployment: Any, client: redis.Redis) -> None:
    """Doubled by more than 100 requests since the last time, halved by fewer than 10, over all tenants."""
    client.hset("truthgpt:{t}:s", mapping={"hits:translation": 60, "hits:summarization": 50, "bypass:embeddings": 500})
    client.hset("truthgpt:{u}:s", mapping={"misses:translation": 41, "misses:text_generation": 101})
    rows = {row["task"]: row for row in deployment.json("cache", "ttl", "--adapt")}
    assert rows["translation"] == {"task": "translation", "requests": 101, "before_s": 7200, "ttl_s": 7200}
    after = {"text_generation": 7200, "translation": 7200, "summarization": 3600, "embeddings": 1800}
    assert deployment.json("cache", "ttl") == after | {"sentiment_analysis": 900}
    again = {row["task"]: row["requests"] for row in deployment.json("cache", "ttl", "--adapt")}
    assert set(again.values()) == {0}
    assert deployment.json("cache", "ttl")["text_generation"] == 3600
    assert "REQUESTS" in deployment.run("cache", "ttl", "--adapt").stdout


def test_without_a_redis(place: Any) -> None:
    """No stack and no URL: it says what to do. A URL alone is enough, and its password is not shown."""
    assert "truthgpt up" in place.refused("cache", "stats")
    place.set(REDIS_URL="redis://:s3cret@127.0.0.1:1/0")
    assert "s3cret" not in place.refused("cache", "stats")
