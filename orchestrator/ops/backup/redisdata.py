"""What Redis knows, as JSON lines: a key a line or more, in words that every version of Redis can be given again.

    {"format": 1, "at_ms": …}                         the first line: when, Unix time
    {"key": …, "type": …, "value": …, "ttl_ms": …}    value: string (a HyperLogLog is one), hash, list, zset
    {…, "more": true}                                 the key goes on with the next line

Values are base64, a hash's and a sorted set's in pairs; what is no UTF-8 in a key is escaped as Python's
surrogateescape does. `ttl_ms` is what was left of the key's life at `at_ms`, -1 for ever.

What is consistent with what: the registry (keys, limits, times to live), its version, the breakers and the jobs are
read in one transaction, and so are as they were at one moment. Every other key, its value and its life, is read in a
transaction with at most 99 others, found by SCAN: of these keys each is whole, but two may be some seconds apart, and
one that came or ended meanwhile may be there or not. No command stalls Redis for longer than such a page takes.

Put back, a key appears at once, also one of many lines: those that need more than one line, and what belongs together,
are made under other names (`truthgpt:restoring:`) and renamed.

Left out is what ends by itself with the process that wrote it: running requests (`:n:`), flights (`:f:`), leases of
jobs, and which alerts a replica is sending.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO

from orchestrator.ops.backup import redisrows
from orchestrator.ops.backup.errors import BackupError, Damaged
from orchestrator.ops.backup.redisrows import Row, b64, name_of, rows, text_of
from orchestrator.store import BREAKERS, EVENTS, JOBS, REGISTRY, REGISTRY_VERSION

if TYPE_CHECKING:
    import redis

PAGE = 100
PAGE_BYTES = 8 << 20  # of strings that are read at once, and of lines that are written at once
HEAVY = 8  # times as much memory as their line take values with many elements
FIELDS = 500  # of a hash that are written by one command
TOGETHER = (REGISTRY, REGISTRY_VERSION, BREAKERS, JOBS)
OURS = f"{redisrows.OURS}*"
STAGED = b"truthgpt:restoring:"  # in front of the names of keys that are being made

_PASSING = re.compile(rb"truthgpt:(\{[^}]*\}:[nf]:|\{jobs\}:lease:|told:|restoring:)")
_ANSWER = re.compile(rb"truthgpt:\{[^}]*\}:c:")
_READ: dict[str, Callable[[Any, bytes], Any]] = {
    "string": lambda pipeline, key: pipeline.get(key),
    "hash": lambda pipeline, key: pipeline.hgetall(key),
    "list": lambda pipeline, key: pipeline.lrange(key, 0, -1),
    "zset": lambda pipeline, key: pipeline.zrange(key, 0, -1, withscores=True),
}
_TRIES = 5


class RedisDataError(BackupError):
    """A key is of a kind that TruthGPT does not have."""

    def __init__(self, key: bytes, kind: str) -> None:
        name = ascii(text_of(key))[:200]
        super().__init__(f"Redis's key {name} is a {kind}, which no key of TruthGPT is", "remove it")


def export(client: redis.Redis, file: BinaryIO, cache: bool = True) -> dict[str, int]:
    """Write the lines; how many keys and limits the registry has, and how many Redis keys there are.

    Without `cache` cached answers are left out. Raises BackupError, redis.RedisError and OSError.
    """
    at_ms = int(time.time() * 1000)
    counts = {"keys": 0, "limits": 0, "entries": 0}
    redisrows.write_head(file, at_ms)
    for row in _together(client):
        if row["key"] == REGISTRY:
            names = [base64.b64decode(name) for name, _ in row["value"] or ()]
            counts["keys"] = sum(name.startswith(b"key:") for name in names)
            counts["limits"] = sum(name.startswith(b"limits:") for name in names)
        redisrows.write(file, row)
        counts["entries"] += row["type"] != "none"
    skipped = {name.encode() for name in TOGETHER}
    found = (
        key for key in client.scan_iter(match=OURS, count=PAGE)
        if key not in skipped and not _PASSING.match(key) and (cache or not _ANSWER.match(key))
    )  # fmt: skip
    for page in pages(found, PAGE):
        for row in read(client, page):
            if row["type"] == "none":
                continue  # it ended meanwhile
            if row["ttl_ms"] >= 0:
                row["ttl_ms"] += int(time.time() * 1000) - at_ms
            redisrows.write(file, row)
            counts["entries"] += 1
    return counts


def load(client: redis.Redis, file: BinaryIO) -> int:
    """Write every key of an export in place of what Redis has under its name; how many.

    The registry, its version, the breakers and the jobs change in one step, last, and every worker hears of it. Raises
    Damaged, redis.RedisError and OSError.
    """
    import redis

    _clear_staged(client)
    together: dict[str, int] = {}  # names of those that are staged, and what is left of their lives
    version: bytes | None = None
    count = 0
    try:
        for page in _bounded(rows(file)):
            with client.pipeline(transaction=True) as pipeline:
                for row in page:
                    count += row["last"]
                    if row["key"] == REGISTRY_VERSION:
                        version = base64.b64decode(row["value"]) if row["type"] == "string" else None
                    elif row["key"] not in TOGETHER:
                        _put(pipeline, row)
                    elif row["type"] not in ("hash", "none"):
                        raise Damaged(f"its Redis data have {row['key']} as a {row['type']}")
                    elif row["type"] == "hash":
                        _push(pipeline, STAGED + name_of(row["key"]), row)
                        together[row["key"]] = row["ttl_ms"]
                pipeline.execute()
        _swap(client, together, version)
    except BaseException:
        with contextlib.suppress(redis.RedisError):  # the next one removes them
            _clear_staged(client)
        raise
    return count


def save(client: redis.Redis, file: BinaryIO, into: BinaryIO) -> None:
    """Write down what Redis has now of the keys that `load` will replace, so that `load` can put it back.

    A key that is not there has type none. Raises as `load` does.
    """
    redisrows.write_head(into, int(time.time() * 1000))
    for row in _together(client):
        redisrows.write(into, row)
    names = (name_of(row["key"]) for row in rows(file) if row["last"] and row["key"] not in TOGETHER)
    for page in pages(names, PAGE):
        for row in read(client, page):
            redisrows.write(into, row)


def counts(client: redis.Redis) -> dict[str, int]:
    """How many keys and limits the registry has. Raises redis.RedisError."""
    names: Any = client.hkeys(REGISTRY)
    return {what: sum(name.startswith(prefix) for name in names)
            for what, prefix in (("keys", b"key:"), ("limits", b"limits:"))}  # fmt: skip


def read(client: redis.Redis, keys: list[bytes]) -> Iterator[Row]:
    """The rows of some keys, type none for those that are not there: at most PAGE, fewer where they are large."""
    waiting, tries = list(keys), 0
    while waiting:
        kinds = _kinds(client, waiting)
        taken, size = 0, 0
        while taken < len(waiting) and (not taken or size + kinds[taken][1] <= PAGE_BYTES):
            size += kinds[taken][1]
            taken += 1
        changed = []
        for key, row in zip(waiting[:taken], _page(client, waiting[:taken], kinds), strict=True):
            if row is None:
                changed.append(key)
            else:
                yield row
        tries = tries + 1 if changed else 0
        if tries >= _TRIES:
            raise RedisDataError(changed[0], "key whose type changes all the time")
        waiting = changed + waiting[taken:]


def pages(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The items in lists of at most `size`."""
    rest = iter(items)
    while page := list(islice(rest, size)):
        yield page


def _bounded(found: Iterable[Row]) -> Iterator[list[Row]]:
    """As `pages`, and what is at once in memory is bounded."""
    page: list[Row] = []
    size = 0
    for row in found:
        weight = row["bytes"] * (1 if row["type"] == "string" else HEAVY)
        if page and (len(page) >= PAGE or size + weight > PAGE_BYTES):
            yield page
            page, size = [], 0
        page.append(row)
        size += weight
    if page:
        yield page


def _kinds(client: redis.Redis, keys: list[bytes]) -> list[tuple[str, int]]:
    """Type of each, and of a string its length."""
    with client.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.type(key)
            pipeline.strlen(key)
        replies = pipeline.execute(raise_on_error=False)
    found = []
    for key, kind, size in zip(keys, replies[::2], replies[1::2], strict=True):
        if isinstance(kind, Exception):
            raise kind
        name = kind.decode()
        if name not in _READ and name != "none":
            raise RedisDataError(key, name)
        found.append((name, size if isinstance(size, int) else 4096))  # WRONGTYPE: it is no string
    return found


def _page(client: redis.Redis, keys: list[bytes], kinds: list[tuple[str, int]]) -> list[Row | None]:
    """Values and lives of one moment; None for a key that has become another type since it was asked for."""
    with client.pipeline(transaction=True) as pipeline:
        for key, (kind, _) in zip(keys, kinds, strict=False):
            _READ.get(kind, _READ["string"])(pipeline, key)
            pipeline.pttl(key)
        replies = pipeline.execute(raise_on_error=False)
    return [
        _row(key, kind, value, ttl)
        for key, (kind, _), value, ttl in zip(keys, kinds, replies[::2], replies[1::2], strict=False)
    ]


def _together(client: redis.Redis) -> list[Row]:
    """What belongs together, as it is at one moment."""
    kinds = ("hash", "string", "hash", "hash")
    names = [name.encode() for name in TOGETHER]
    found = []
    for name, row in zip(names, _page(client, names, [(kind, 0) for kind in kinds]), strict=True):
        if row is None:
            raise RedisDataError(name, "key of another type")
        found.append(row)
    return found


def _row(key: bytes, kind: str, value: Any, ttl: Any) -> Row | None:
    import redis

    if isinstance(value, redis.ResponseError) and "WRONGTYPE" in str(value):
        return None
    for reply in (value, ttl):
        if isinstance(reply, Exception):
            raise reply
    if ttl == -2:
        return {"key": text_of(key), "type": "none", "value": None, "ttl_ms": -1}
    if kind == "none":
        return None  # it has come meanwhile
    encoded: Any
    if kind == "hash":
        encoded = [[b64(name), b64(item)] for name, item in value.items()]
    elif kind == "zset":
        encoded = [[b64(item), repr(float(score))] for item, score in value]
    else:
        encoded = b64(value) if kind == "string" else [b64(item) for item in value]
    return {"key": text_of(key), "type": kind, "value": encoded, "ttl_ms": ttl}


def _put(pipeline: Any, row: Row) -> None:
    """The commands that make a key what its row, or its rows, say."""
    key = name_of(row["key"])
    if row["type"] == "none":
        pipeline.unlink(key)
        return
    if row["first"] and row["last"]:
        _push(pipeline, key, row)
        if row["ttl_ms"] >= 0:
            pipeline.pexpire(key, row["ttl_ms"])
        return
    _push(pipeline, STAGED + key, row)
    if row["last"]:
        _rename(pipeline, key, row["ttl_ms"])


def _push(pipeline: Any, key: bytes, row: Row) -> None:
    """Make a key of a row, or add to it what the row has."""
    kind, value = row["type"], row["value"]
    if row["first"]:
        pipeline.unlink(key)
    if kind == "string":
        pipeline.append(key, base64.b64decode(value))
    elif kind == "hash":
        for part in pages(value, FIELDS):
            pipeline.hset(key, mapping={base64.b64decode(name): base64.b64decode(item) for name, item in part})
    elif kind == "list":
        for part in pages(value, FIELDS):
            pipeline.rpush(key, *[base64.b64decode(item) for item in part])
    elif kind == "zset":
        for part in pages(value, FIELDS):
            pipeline.zadd(key, {base64.b64decode(item): float(score) for item, score in part})


def _rename(pipeline: Any, key: bytes, ttl_ms: int) -> None:
    pipeline.rename(STAGED + key, key)
    if ttl_ms >= 0:
        pipeline.pexpire(key, ttl_ms)


def _clear_staged(client: redis.Redis) -> None:
    """Remove what a restore that was killed has left."""
    for page in pages(client.scan_iter(match=STAGED + b"*", count=1000), PAGE):
        client.unlink(*page)


def _swap(client: redis.Redis, together: dict[str, int], version: bytes | None) -> None:
    """Replace what belongs together. The version only ever grows, or a worker would take an old copy for a new one."""

    def number(value: bytes | None) -> int:
        return int(value) if value is not None and value.isdigit() and len(value) < 19 else 0

    now: Any = client.get(REGISTRY_VERSION)
    with client.pipeline(transaction=True) as pipeline:
        for name in (REGISTRY, BREAKERS, JOBS):
            if name in together:
                _rename(pipeline, name.encode(), together[name])
            else:
                pipeline.unlink(name)
        pipeline.set(REGISTRY_VERSION, max(number(version), number(now)) + 1)
        pipeline.publish(EVENTS, json.dumps({"event": "registry"}))
        pipeline.execute()
