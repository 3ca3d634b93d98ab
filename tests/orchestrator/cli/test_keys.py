"""`truthgpt keys`: what is made, listed, revoked and rotated, in a real Redis."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from typing import Any

import pytest
import redis

from orchestrator import keys
from orchestrator.ops.keyring import Keyring
from orchestrator.store import REGISTRY
from tests.orchestrator.gateway import write_state
from tests.redis import RealRedis


@pytest.fixture
def deployment(place: Any, server: RealRedis) -> Any:
    """A place whose running stack has an empty Redis."""
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    write_state(place.home, "http://127.0.0.1:8123", redis=server.url)
    return place


def credential_in(text: str) -> str:
    """The one key that a human output shows."""
    found = {word for line in text.splitlines() for word in line.replace("=", " ").split() if keys.split(word)}
    assert len(found) == 1, text
    return found.pop()


def test_create_hands_over_a_key_once(deployment: Any) -> None:
    """--json is id, key, tenant and scope and nothing else; for people the key stands in lines that can be pasted."""
    document = deployment.json("keys", "create", "--tenant", "acme")
    assert list(document) == ["id", "key", "tenant", "scope"]
    assert (document["tenant"], document["scope"]) == ("acme", "inference")
    assert keys.split(document["key"]) is not None and document["key"].split("_")[1] == document["id"]
    shown = deployment.run("keys", "create", "--tenant", "ops", "--scope", "admin", "--expires", "1d").stdout
    credential = credential_in(shown)
    assert f"export TRUTHGPT_API_KEY={credential}" in shown and "not shown again" in shown and "UTC" in shown
    assert "curl http://127.0.0.1:8123/v1/models" in shown
    listed = deployment.run("keys", "list").stdout + json.dumps(deployment.json("keys", "list"))
    listed += deployment.run("keys", "show", credential.split("_")[1]).stdout
    for made in (document["key"], credential):
        assert made not in listed and made.split("_", 2)[2] not in listed and "hash" not in listed


def test_every_flag_of_create_is_kept(deployment: Any) -> None:
    """Limits, scope, expiry and note are what show and list say; what is not given is not there."""
    arguments = (
        "--per-minute", "1", "--per-hour", "2", "--per-day", "3", "--tokens-per-minute", "4", "--tokens-per-day", "5",
        "--concurrency", "6", "--scope", "admin", "--expires", "1d12h", "--note", "la tienda de Ñandú",
    )  # fmt: skip
    before = time.time()
    id = deployment.json("keys", "create", "--tenant", "acme", *arguments)["id"]
    found = deployment.json("keys", "show", id)
    assert found["limits"] == {
        "per_minute": 1, "per_hour": 2, "per_day": 3, "tokens_per_minute": 4, "tokens_per_day": 5, "concurrency": 6,
    }  # fmt: skip
    assert (found["scope"], found["note"], found["state"]) == ("admin", "la tienda de Ñandú", "active")
    assert before <= found["created"] <= time.time() and found["expires"] == found["created"] + 129_600
    assert found["revoked"] is None and deployment.json("keys", "list") == [found]
    shown = deployment.run("keys", "show", id).stdout
    assert "per_minute 1" in shown and "la tienda de Ñandú" in shown
    plain = deployment.json("keys", "show", deployment.json("keys", "create", "--tenant", "b")["id"])
    assert (plain["limits"], plain["expires"], plain["note"]) == ({}, None, "")


@pytest.mark.parametrize(
    "arguments",
    [
        (), ("--tenant", "open"), ("--tenant", ""), ("--tenant", "a b"), ("--tenant", "ñ"), ("--tenant", "x" * 65),
        ("--tenant", "{a}"),
        *[("--tenant", "a", *more) for more in (
            ("--per-minute", "0"), ("--per-day", "-1"), ("--per-day", "x"), ("--per-day", "9" * 14),
            ("--per-day", "default"), ("--scope", "root"), ("--expires", "0d"), ("--expires", "30"),
            ("--expires", "-1d"), ("--note", "x\x1b[31m"), ("--note", "x" * 201),
        )],
    ],
)  # fmt: skip
def test_what_no_key_can_be_is_wrong_usage(deployment: Any, arguments: tuple[str, ...]) -> None:
    """Names, numbers, times and notes that cannot be are refused with exit code 2, and nothing is made."""
    deployment.refused("keys", "create", *arguments, code=2)
    assert deployment.json("keys", "list") == []


def test_list_shows_states_and_tenants(deployment: Any, server: RealRedis) -> None:
    """active, expired and revoked; --tenant shows one tenant's; without keys the hint is how to make one."""
    assert "keys create" in deployment.run("keys", "list").stderr
    made = [deployment.json("keys", "create", "--tenant", tenant)["id"] for tenant in ("a", "b", "b")]
    with redis.Redis.from_url(server.url) as client:
        short = Keyring(client, lambda: time.time() - 10).create("b", expires_s=9)[0].id
    assert deployment.run("keys", "revoke", made[1]).stdout == f"revoked {made[1]} of b\n"
    states = {row["id"]: row["state"] for row in deployment.json("keys", "list", "--tenant", "b")}
    assert states == {made[1]: "revoked", made[2]: "active", short: "expired"}
    shown = deployment.run("keys", "list").stdout
    assert all(word in shown for word in (*made, short, "active", "expired", "revoked", "never"))


def test_revoke_twice_is_the_same(deployment: Any) -> None:
    """Revoked is revoked, since the first time; a key that is not there is an error with a hint."""
    id = deployment.json("keys", "create", "--tenant", "a")["id"]
    first = deployment.json("keys", "revoke", id, "--yes")
    assert first["state"] == "revoked" and deployment.json("keys", "revoke", id) == first
    for verb in ("revoke", "show", "rotate"):
        assert "there is no key nope" in deployment.refused("keys", verb, "nope")
        deployment.refused("keys", verb, "a:b", code=2)


@pytest.mark.parametrize(("answer", "state"), [("y", "revoked"), ("n", "active")])
def test_revoke_asks_who_types(deployment: Any, answer: str, state: str) -> None:
    """At a terminal somebody has to agree; a script, which has no terminal, is not asked (as above)."""
    id = deployment.json("keys", "create", "--tenant", "a")["id"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "keys", "revoke", id], stdin=theirs, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        os.write(ours, f"{answer}\n".encode())
        _, stderr = process.communicate(timeout=20)
    os.close(ours)
    os.close(theirs)
    assert b"Revoke the key" in stderr and (process.returncode == 0) == (answer == "y")
    assert deployment.json("keys", "show", id)["state"] == state


def test_rotate_hands_over_another_key_of_the_same_id(deployment: Any, server: RealRedis) -> None:
    """The secret is another, all else stays; the one before works for the grace and by default not at all."""
    made = deployment.json("keys", "create", "--tenant", "a", "--per-day", "9")
    before = deployment.json("keys", "show", made["id"])
    rotated = deployment.json("keys", "rotate", made["id"], "--grace", "1h")
    assert {**rotated, "key": ""} == {**made, "key": ""} and rotated["key"] != made["key"]
    assert deployment.json("keys", "show", made["id"]) == before
    with redis.Redis.from_url(server.url) as client:
        raw = client.hget(REGISTRY, f"key:{made['id']}")
        key = keys.read(made["id"], raw)
        assert all(key.takes(each["key"].split("_", 2)[2], time.time() + 3000) for each in (made, rotated))
        shown = deployment.run("keys", "rotate", made["id"]).stdout
        key = keys.read(made["id"], client.hget(REGISTRY, f"key:{made['id']}"))
    assert key.takes(credential_in(shown).split("_", 2)[2], time.time())
    assert not any(key.takes(each["key"].split("_", 2)[2], time.time()) for each in (made, rotated))
    deployment.run("keys", "revoke", made["id"])
    assert "is revoked" in deployment.refused("keys", "rotate", made["id"])


def test_without_a_redis_the_hint_is_up(place: Any) -> None:
    """With nothing running and no Redis set every command says how to start, and none has a traceback."""
    for arguments in (("list",), ("create", "--tenant", "a"), ("show", "x"), ("revoke", "x"), ("rotate", "x")):
        assert "truthgpt up" in place.refused("keys", *arguments)
    place.set(REDIS_URL="unix:///nowhere/redis.sock")
    assert "/nowhere/redis.sock" in place.refused("keys", "list")
