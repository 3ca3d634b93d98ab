"""Writing keys and limits: one step each, announced, none lost to another, and nothing secret kept."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import redis

from orchestrator import keys
from orchestrator.ops import redis as ops_redis
from orchestrator.ops.keyring import Keyring, KeyringError
from orchestrator.settings import Settings
from orchestrator.store import EVENTS, REGISTRY, REGISTRY_VERSION
from tests.orchestrator.gateway import write_state
from tests.redis import RealRedis

NOW = 1_000_000.0


@pytest.fixture
def keyring(client: redis.Redis) -> Keyring:
    return Keyring(client, lambda: NOW)


def test_every_change_raises_the_version_and_is_announced(client: redis.Redis, keyring: Keyring) -> None:
    """Create, revoke, rotate and set limits: one version and one announcement each; what changes nothing has none."""
    listener = client.pubsub()
    listener.subscribe(EVENTS)
    key, _ = keyring.create("acme")
    keyring.rotate(key.id)
    keyring.set_limits(key.id, {"per_day": 1})
    keyring.revoke(key.id)
    keyring.revoke(key.id)
    assert client.get(REGISTRY_VERSION) == b"4"
    payloads = []
    while message := listener.get_message(ignore_subscribe_messages=False, timeout=0.2):
        payloads += [json.loads(message["data"])] if message["type"] == "message" else []
    assert payloads == [{"event": "registry"}] * 4
    listener.close()


def test_no_secret_is_kept(client: redis.Redis, keyring: Keyring) -> None:
    """Neither the credential nor its secret is anywhere in Redis, before and after a rotation."""
    key, first = keyring.create("acme", note="shop")
    _, second = keyring.rotate(key.id, 60.0)
    stored = b"".join(value for pair in client.hgetall(REGISTRY).items() for value in pair).decode()
    for credential in (first, second):
        assert credential not in stored and credential.split("_", 2)[2] not in stored
    assert keys.split(second) is not None and keyring.get(key.id).takes(second.split("_", 2)[2], NOW)


def test_changes_at_the_same_time_are_all_kept(client: redis.Redis, keyring: Keyring, server: RealRedis) -> None:
    """Six writers set a limit each of the same caller, over and over: at the end all six are set."""

    def write(name: str) -> None:
        with redis.Redis.from_url(server.url) as own:
            for value in range(20):
                Keyring(own).set_limits("x", {name: value})

    writers = [threading.Thread(target=write, args=(name,)) for name in keys.LIMIT_NAMES]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert keyring.limits("x") == dict.fromkeys(keys.LIMIT_NAMES, 19)
    assert client.get(REGISTRY_VERSION) == b"120"


def test_a_revocation_survives_a_rotation_at_the_same_time(client: redis.Redis, keyring: Keyring) -> None:
    """A key that was revoked between a rotation's reading and writing stays revoked, and the rotation says so."""
    key, _ = keyring.create("acme")

    class Slow(Keyring):
        def _read(self, id: str) -> tuple[keys.Key, bytes]:
            found = super()._read(id)
            if found[0].revoked is None:
                keyring.revoke(id)  # in between
            return found

    with pytest.raises(KeyringError, match="is revoked"):
        Slow(client, lambda: NOW).rotate(key.id)
    assert keyring.get(key.id).revoked == NOW


def test_only_active_keys_are_rotated(keyring: Keyring, client: redis.Redis) -> None:
    """An expired key does not come back to life by a new secret; one that is not there is an error with a hint."""
    key, _ = keyring.create("acme", expires_s=10.0)
    with pytest.raises(KeyringError, match="is expired"):
        Keyring(client, lambda: NOW + 10.0).rotate(key.id)
    for act in (keyring.get, keyring.revoke, keyring.rotate):
        with pytest.raises(KeyringError, match="there is no key nope") as caught:
            act("nope")
        assert caught.value.hint


def test_listing(keyring: Keyring, client: redis.Redis) -> None:
    """Oldest first, a tenant's only if asked; a malformed record hides no other, and showing it tells."""
    later = Keyring(client, iter(range(1, 9)).__next__)
    made = [later.create(tenant)[0] for tenant in ("b", "a", "b")]
    client.hset(REGISTRY, "key:bad", "{")
    assert keyring.all() == made and [key.id for key in keyring.all("a")] == [made[1].id]
    with pytest.raises(KeyringError, match="malformed"):
        keyring.get("bad")


def test_limits_are_set_and_given_back(keyring: Keyring, client: redis.Redis) -> None:
    """What is not named stays, None gives back, and with nothing set nothing is stored; a broken record is replaced."""
    assert keyring.limits("x") == {} and keyring.set_limits("x", {"per_minute": 5, "per_day": 0})
    assert keyring.set_limits("x", {"per_minute": None, "concurrency": 2}) == {"per_day": 0, "concurrency": 2}
    assert keyring.set_limits("x", dict.fromkeys(keys.LIMIT_NAMES)) == {} and not client.hexists(REGISTRY, "limits:x")
    client.hset(REGISTRY, "limits:x", "nonsense")
    assert keyring.limits("x") == {} and keyring.set_limits("x", {"per_day": 3}) == keyring.limits("x") == {
        "per_day": 3
    }


def test_commands_find_their_redis(server: RealRedis, tmp_path: Path) -> None:
    """The running stack's Redis goes before the settings'; without either the hint says how to start."""
    home = tmp_path / "home"
    settings = Settings(home=home)
    with pytest.raises(ops_redis.NoRedis) as caught, ops_redis.connect(settings):
        pass
    assert "truthgpt up" in caught.value.hint
    with ops_redis.connect(Settings(home=home, redis_url=server.url)) as client:
        assert client.ping()
    write_state(home, "http://127.0.0.1:1", redis=server.url)
    with ops_redis.connect(Settings(home=home, redis_url="redis://127.0.0.1:1")) as client:
        assert client.ping()


@pytest.mark.parametrize(
    "url", ["redis://user:hunter2@127.0.0.1:1/0", "redis://u:hunter2@x:y/0", "unix:///nowhere/at/all"]
)
def test_a_redis_that_does_not_answer_is_told_without_its_password(tmp_path: Path, url: str) -> None:
    """Away or wrongly written, it is one sentence with a hint, and no password is in it."""
    with pytest.raises(ops_redis.NoRedis) as caught, ops_redis.connect(Settings(home=tmp_path, redis_url=url)):
        pass
    assert caught.value.hint and "hunter2" not in str(caught.value)


def test_a_failure_inside_is_told_the_same_way(server: RealRedis, tmp_path: Path) -> None:
    """An error of Redis becomes NoRedis; what else happens inside is passed on as it is."""
    with pytest.raises(ops_redis.NoRedis), ops_redis.connect(Settings(home=tmp_path, redis_url=server.url)) as client:
        client.execute_command("NO-SUCH-COMMAND")
    with pytest.raises(ZeroDivisionError), ops_redis.connect(Settings(home=tmp_path, redis_url=server.url)):
        raise ZeroDivisionError
