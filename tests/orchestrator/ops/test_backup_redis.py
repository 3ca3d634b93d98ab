"""What Redis knows as JSON lines, and back: on a real Redis."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.ops.backup import redisdata, redisrows
from orchestrator.ops.backup.errors import BackupError, Damaged, Newer
from orchestrator.store import JOBS, REGISTRY, REGISTRY_VERSION, history_key, lease_key, told_key, users_key
from tests.redis import RealRedis


@pytest.fixture(scope="module")
def client() -> Iterator[redis.Redis]:
    with RealRedis() as server, redis.Redis.from_url(server.url) as opened:
        yield opened


@pytest.fixture(autouse=True)
def empty(client: redis.Redis) -> None:
    client.flushall()


def exported(client: redis.Redis, cache: bool = True) -> io.BytesIO:
    file = io.BytesIO()
    redisdata.export(client, file, cache)
    file.seek(0)
    return file


def everything(client: redis.Redis) -> dict[bytes, tuple[bytes, object]]:
    """Type and value of each key, but for the version, which always grows."""
    found: dict[bytes, tuple[bytes, object]] = {}
    for key in client.keys("*"):
        kind = client.type(key)
        reads = {
            b"string": client.get, b"hash": client.hgetall, b"list": lambda key: client.lrange(key, 0, -1),
            b"zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        }  # fmt: skip
        if key.decode("latin-1") != REGISTRY_VERSION:
            found[key] = (kind, reads[kind](key))
    return found


_bytes = st.binary(max_size=30)
_some = st.binary(min_size=1, max_size=30)
_values = st.one_of(
    _bytes,
    st.dictionaries(_bytes, _bytes, min_size=1, max_size=5),
    st.lists(_bytes, min_size=1, max_size=5),
    st.dictionaries(_bytes, st.floats(allow_nan=False), min_size=1, max_size=5).map(lambda found: ("zset", found)),
)
_names = st.one_of(_some, st.text(min_size=1, max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")))


@given(
    st.dictionaries(_names, st.tuples(_values, st.one_of(st.none(), st.integers(60_000, 10**12))), max_size=12),
    st.sampled_from([4, 40, redisrows.PART_BYTES]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
def test_every_key_comes_back(
    client: redis.Redis, keys: dict[bytes, tuple[object, int | None]], part_bytes: int
) -> None:
    """Any names, bytes and lives in strings, hashes, lists and sorted sets are the same in an empty Redis.

    However many lines a key takes.
    """
    client.flushall()
    for name, (value, ttl_ms) in keys.items():
        key = b"truthgpt:{t}:l:" + name
        if isinstance(value, bytes):
            client.set(key, value)
        elif isinstance(value, dict):
            client.hset(key, mapping=value)
        elif isinstance(value, list):
            client.rpush(key, *value)
        elif isinstance(value, tuple):
            client.zadd(key, value[1])
        if ttl_ms is not None:
            client.pexpire(key, ttl_ms)
    before = everything(client)
    lives = {key: client.pttl(key) for key in before}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(redisrows, "PART_BYTES", part_bytes)
        file = exported(client)
    client.flushall()
    redisdata.load(client, file)
    assert everything(client) == before
    for key, life in lives.items():
        now = client.pttl(key)
        assert (now == -1) if life == -1 else (life - 20_000 < now <= life + 100), (key, life, now)


def test_what_ends_with_its_process_is_left_out(client: redis.Redis) -> None:
    """Leases, flights, told alerts and what is not ours are not exported; history, users and answers are."""
    for name in ("truthgpt:{acme}:n:k1", "truthgpt:{acme}:f:abc", lease_key("logs"), told_key("x"), "other"):
        client.set(name, "x")
    client.set("truthgpt:{acme}:c:abc", "answer")
    client.rpush(history_key("logs"), "2", "1")
    client.pfadd(users_key(7), "a", "b")
    client.hset(JOBS, "logs:last_run", "1")
    file = exported(client)
    text = file.getvalue().decode()
    assert [name for name in ("n:k1", "f:abc", "lease", "told", "other") if name in text] == []
    rows = {row["key"]: row["type"] for row in redisdata.rows(file)}
    assert rows["truthgpt:{acme}:c:abc"] == "string" and rows[history_key("logs")] == "list"
    client.flushall()
    file.seek(0)
    redisdata.load(client, file)
    assert client.pfcount(users_key(7)) == 2 and client.lrange(history_key("logs"), 0, -1) == [b"2", b"1"]
    assert client.hgetall(JOBS) == {b"logs:last_run": b"1"}
    assert "c:abc" not in exported(client, cache=False).getvalue().decode()


def test_lives_are_shorter_by_what_has_passed(client: redis.Redis) -> None:
    """A key whose life ended since the export stays away, another has what is left; one without end has none."""
    now = int(time.time() * 1000)
    rows = [
        {"format": 1, "at_ms": now - 100_000},
        *({"key": f"truthgpt:{{t}}:c:{ttl}", "type": "string", "value": "eA==", "ttl_ms": ttl}
          for ttl in (-1, 0, 50_000, 300_000)),
    ]  # fmt: skip
    redisdata.load(client, io.BytesIO(b"".join(json.dumps(row).encode() + b"\n" for row in rows)))
    assert sorted(client.keys("truthgpt:{t}*")) == [b"truthgpt:{t}:c:-1", b"truthgpt:{t}:c:300000"]
    assert client.pttl("truthgpt:{t}:c:-1") == -1 and 150_000 < client.pttl("truthgpt:{t}:c:300000") <= 200_000


def test_registry_and_version_are_of_one_moment(client: redis.Redis) -> None:
    """While a writer raises both in one step, no export has one without the other."""
    ending = threading.Event()
    client.hset(REGISTRY, "key:n", "0")
    client.set(REGISTRY_VERSION, "0")

    def work() -> None:
        with redis.Redis(connection_pool=client.connection_pool) as own:
            while not ending.is_set():
                with own.pipeline(transaction=True) as pipeline:
                    pipeline.hincrby(REGISTRY, "key:n", 1)
                    pipeline.incr(REGISTRY_VERSION)
                    pipeline.execute()

    writer = threading.Thread(target=work)
    writer.start()
    try:
        for _ in range(200):
            rows = {row["key"]: row["value"] for row in redisdata.rows(exported(client))}
            assert rows[REGISTRY][0][1] == rows[REGISTRY_VERSION]
    finally:
        ending.set()
        writer.join()


def test_a_page_is_bounded(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 answers of 1 MB each are read 8 MB at a time, and written so."""
    for number in range(40):
        client.set(f"truthgpt:{{t}}:c:{number}", b"x" * (1 << 20))
    sizes: list[int] = []
    real = redisdata._page

    def page(client: redis.Redis, keys: list[bytes], kinds: list[tuple[str, int]]) -> object:
        sizes.append(len(keys))
        return real(client, keys, kinds)

    monkeypatch.setattr(redisdata, "_page", page)
    file = exported(client)
    assert max(sizes) == 8 and sum(sizes) == 40 + len(redisdata.TOGETHER)
    client.flushall()
    file.seek(0)
    redisdata.load(client, file)
    assert client.strlen("truthgpt:{t}:c:39") == 1 << 20


def test_a_key_that_changes_its_type_meanwhile(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for again, and exported as what it has become."""
    client.set("truthgpt:{t}:l:a", "x")
    real = redisdata._kinds

    def kinds(client: redis.Redis, keys: list[bytes]) -> list[tuple[str, int]]:
        found = real(client, keys)
        if client.type("truthgpt:{t}:l:a") == b"string":
            client.delete("truthgpt:{t}:l:a")
            client.hset("truthgpt:{t}:l:a", "b", "c")
        return found

    monkeypatch.setattr(redisdata, "_kinds", kinds)
    rows = {row["key"]: row["type"] for row in redisdata.rows(exported(client))}
    assert rows["truthgpt:{t}:l:a"] == "hash"


def test_a_kind_that_nobody_knows(client: redis.Redis) -> None:
    """A set or stream under our prefix is an error that names it, not left out."""
    client.sadd("truthgpt:{t}:odd", "x")
    with pytest.raises(BackupError, match="odd' is a set"):
        exported(client)


def test_saved_keys_are_put_back(client: redis.Redis) -> None:
    """What `load` replaces comes back by what `save` wrote; keys that were not there go again."""
    client.set("truthgpt:{t}:c:a", "old")
    client.hset(REGISTRY, "key:x", "1")
    file = exported(client)
    client.set("truthgpt:{t}:c:a", "new")
    client.delete(REGISTRY)
    client.hset(JOBS, "a", "b")
    before = everything(client)
    saved = io.BytesIO()
    redisdata.save(client, file, saved)
    file.seek(0)
    redisdata.load(client, file)
    assert client.get("truthgpt:{t}:c:a") == b"old" and client.exists(JOBS) == 0
    saved.seek(0)
    redisdata.load(client, saved)
    assert everything(client) == before


def large(client: redis.Redis) -> None:
    """One of each kind that takes several lines, the registry and an answer among them."""
    for start in range(0, 30_000, 10_000):
        names = range(start, start + 10_000)
        client.hset(REGISTRY, mapping={f"key:{name:06d}": "x" * 150 for name in names})
        client.rpush("truthgpt:{t}:l:list", *[f"{name:06d}" + "y" * 150 for name in names])
        client.zadd("truthgpt:{t}:l:zset", {f"{name:06d}" + "z" * 150: name / 7 for name in names})
    client.set("truthgpt:{t}:c:answer", bytes(range(256)) * 40_000, px=600_000)


def test_large_keys_take_many_lines_and_appear_at_once(client: redis.Redis) -> None:
    """No line is longer than its bound; while they are put back nobody sees a key without all of it, nor a leftover."""
    large(client)
    before = everything(client)
    file = exported(client)
    lines = file.getvalue().splitlines(keepends=True)
    assert max(map(len, lines)) < 2 * redisrows.PART_BYTES < redisrows.LINE_BYTES and len(lines) > 25
    assert redisdata.counts(client) == {"keys": 30_000, "limits": 0}
    client.flushall()
    client.hset(REGISTRY, "key:old", "1")
    client.rpush("truthgpt:{t}:l:list", "old")
    client.set(redisdata.STAGED + b"truthgpt:{t}:l:gone", "left by a restore that was killed")
    seen: set[tuple[int, ...]] = set()
    ending = threading.Event()

    def look() -> None:
        with redis.Redis(connection_pool=client.connection_pool) as own:
            while not ending.is_set():
                with own.pipeline(transaction=True) as pipeline:
                    pipeline.hlen(REGISTRY).llen("truthgpt:{t}:l:list").zcard("truthgpt:{t}:l:zset")
                    seen.add(tuple([*pipeline.strlen("truthgpt:{t}:c:answer").execute()]))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        redisdata.load(client, file)
    finally:
        ending.set()
        watcher.join()
    assert everything(client) == before and 500_000 < client.pttl("truthgpt:{t}:c:answer") <= 600_000
    for position, whole in enumerate(((1, 30_000), (1, 30_000), (0, 30_000), (0, 10_240_000))):
        assert {row[position] for row in seen} <= set(whole)


def test_a_load_that_fails_leaves_nothing_half(client: redis.Redis) -> None:
    """Where the data end in the middle of a large key, that and the registry are as they were, and nothing is left."""
    large(client)
    lines = exported(client).getvalue().splitlines(keepends=True)
    client.flushall()
    client.hset(REGISTRY, "key:old", "1")
    before = everything(client)
    cut = next(number for number, line in enumerate(lines) if b'"more":true' in line and b"l:list" in line)
    with pytest.raises(Damaged, match="without its end"):
        redisdata.load(client, io.BytesIO(b"".join(lines[: cut + 1])))
    found = everything(client)
    assert found[REGISTRY.encode()] == before[REGISTRY.encode()] and b"truthgpt:{t}:l:list" not in found
    assert not [key for key in found if key.startswith(redisdata.STAGED)]


def test_what_could_not_be_put_back_is_not_exported(client: redis.Redis) -> None:
    """An element that is larger than a line may be is an error that names its key; one that just fits comes back."""
    fits = (redisrows.LINE_BYTES - 1000) // 4 * 3
    client.rpush("truthgpt:{t}:l:list", b"x" * fits, b"y", b"z" * fits)
    file = exported(client)
    before = everything(client)
    client.flushall()
    redisdata.load(client, file)
    assert everything(client) == before
    client.rpush("truthgpt:{t}:l:list", b"x" * (fits + 2000))
    with pytest.raises(BackupError, match="l:list' has an element of") as failed:
        exported(client)
    assert failed.value.hint


def test_data_of_a_newer_version(client: redis.Redis) -> None:
    """Another form is no damage: the hint is to upgrade."""
    with pytest.raises(Newer, match="newer version"):
        redisdata.load(client, io.BytesIO(b'{"format":2,"at_ms":1}\n'))


@pytest.mark.parametrize(
    "line",
    [b"", b"[]\n", b"{}\n", b'{"format":1,"at_ms":1}\nx\n',
     b'{"format":1,"at_ms":1}\n{"key":"other","type":"string","value":"","ttl_ms":-1}\n',
     b'{"format":1,"at_ms":1}\n{"key":"truthgpt:x","type":"set","value":[],"ttl_ms":-1}\n',
     b'{"format":1,"at_ms":1}\n{"key":"truthgpt:x","type":"string","value":"&","ttl_ms":-1}\n',
     b'{"format":1,"at_ms":1}\n{"key":"truthgpt:x","type":"hash","value":["a"],"ttl_ms":-1}\n',
     b'{"format":1,"at_ms":1}\n{"key":"truthgpt:x","type":"string","value":"","ttl_ms":"1"}\n',
     b'{"format":1,"at_ms":1}\n{"key":"truthgpt:x","type":"string","value":"","ttl_ms":-1}',
     b'{"format":1,"at_ms":1}\n{"key":"truthgpt:x","type":"list","value":[],"ttl_ms":-1}\n',
     b'{"format":1,"at_ms":1}\n{"key":"truthgpt:x","type":"zset","value":[["","nan"]],"ttl_ms":-1}\n',
     b'{"format":1,"at_ms":1}\n{"key":"truthgpt:x","type":"string","value":"","ttl_ms":-1,"more":true}\n',
     b'{"format":1,"at_ms":1}\n{"key":"truthgpt:x","type":"string","value":"","ttl_ms":-1,"x":1}\n',
     b'{"format":1,"at_ms":1}\n{"key":"truthgpt:x","type":"none","value":null,"ttl_ms":-1,"more":true}\n',
     b'{"format":1,"at_ms":1}\n{"key":"truthgpt:x","type":"string","value":"","ttl_ms":-1,"more":true}\n'
     b'{"key":"truthgpt:y","type":"string","value":"","ttl_ms":-1}\n',
     b'{"format":1,"at_ms":1}\n{"key":"truthgpt:{registry}","type":"string","value":"","ttl_ms":-1}\n',
     b'{"format":1,"at_ms":1}\n{"key":"truthgpt:x","type":"string","value":"' + b"A" * (4 << 20) + b'","ttl_ms":-1}\n',
     b'{"format":1,"at_ms":1}\n{"key":"truthgpt:x","type":"hash","value":' + b"[" * 100_000 + b"\n"],
    ids=lambda line: str(len(line)),
)  # fmt: skip
def test_data_that_are_none(client: redis.Redis, line: bytes) -> None:
    """Lines of another form, keys of others, types and values that do not fit are Damaged; Redis is left alone."""
    client.set("truthgpt:{t}:c:a", "x")
    with pytest.raises(Damaged):
        redisdata.load(client, io.BytesIO(line))
    assert everything(client) == {b"truthgpt:{t}:c:a": (b"string", b"x")}
