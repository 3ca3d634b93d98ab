"""What operators do with the answer cache. Everything is read with SCAN: constant memory, and Redis goes on serving.

An answer that is stored or ends while its neighbours are read may be seen or not. All raise redis.RedisError.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import redis

from orchestrator.cache import DEFAULT_TTL_S, HEAD_MAX_BYTES, adapt, decode, read_head
from orchestrator.ops.keyring import EVENT, swap
from orchestrator.store import EVENTS, REGISTRY, REGISTRY_VERSION, answer_pattern, stats_pattern, tenant_of

_PAGE = 500

# KEYS: a hash and, where the workers are to know, the registry's version. ARGV: fence (0: none), field, value, channel,
# event.
_FENCED = """
if ARGV[1] ~= '0' then
  if tonumber(redis.call('HGET', KEYS[1], 'fence') or '0') > tonumber(ARGV[1]) then return 0 end
  redis.call('HSET', KEYS[1], 'fence', ARGV[1])
end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
if KEYS[2] then
  redis.call('INCR', KEYS[2])
  redis.call('PUBLISH', ARGV[4], ARGV[5])
end
return 1
"""
_COUNTED = ("hits", "misses", "bypass", "large")


class Overtaken(Exception):
    """A newer run has changed this already; `hint` says what that means."""

    def __init__(self) -> None:
        super().__init__("a newer run has adapted the cache already")
        self.hint = "nothing is to be done"


def stats(client: redis.Redis) -> dict[str, Any]:
    """Sums over tenants and replicas, since the counters began.

    `bytes` are those of the answers as stored, `evictions` all that Redis made room of since its start. `tasks` has
    hits, misses, bypass (asked not to be cached) and large (over the bound, not stored) of each task.
    """
    tasks = {task: dict.fromkeys(_COUNTED, 0) for task in DEFAULT_TTL_S}
    for _, counters in _counters(client):
        for name, value in counters.items():
            what, _, task = name.partition(":")
            if what in _COUNTED:
                row = tasks.setdefault(task, dict.fromkeys(_COUNTED, 0))
                row[what] += value
    entries = size = 0
    for page in _pages(client.scan_iter(match=answer_pattern(), count=_PAGE)):
        sizes = _pipelined(client, [("STRLEN", key) for key in page])
        entries, size = entries + len(page), size + sum(sizes)
    hits, misses = (sum(row[what] for row in tasks.values()) for what in ("hits", "misses"))
    return {
        "hits": hits,
        "misses": misses,
        "hit_rate": round(hits / (hits + misses), 4) if hits + misses else 0.0,
        "evictions": int(client.info("stats")["evicted_keys"]),
        "entries": entries,
        "bytes": size,
        "tasks": tasks,
    }


def clear(client: redis.Redis, tenant: str | None = None, model: str | None = None) -> int:
    """Remove the answers of a tenant, of a model, of both, or all; how many. Counters stay."""
    removed = 0
    for page in _pages(client.scan_iter(match=answer_pattern(tenant), count=_PAGE)):
        if model is not None:
            heads = _pipelined(client, [("GETRANGE", key, 0, HEAD_MAX_BYTES - 1) for key in page])
            page = [key for key, head in zip(page, heads, strict=True) if _model_of(head) == model]
        if page:
            removed += sum(_pipelined(client, [("UNLINK", key) for key in page]))
    return removed


def inspect(client: redis.Redis, digest: str = "", limit: int = 50, text: bool = False) -> list[dict[str, Any]]:
    """At most `limit` answers whose key begins with `digest`. With `text` also what the model said."""
    found = []
    for page in _pages(islice(client.scan_iter(match=answer_pattern(None, digest), count=_PAGE), limit)):
        read = ("GET",) if text else ("GETRANGE", 0, HEAD_MAX_BYTES - 1)
        commands = [command for key in page for command in ((read[0], key, *read[1:]), ("PTTL", key), ("STRLEN", key))]
        replies = iter(_pipelined(client, commands))
        for key, entry, ttl_ms, size in zip(page, replies, replies, replies, strict=False):
            if size and entry:  # else it ended meanwhile
                found.append(_row(key.decode(), entry, ttl_ms, size, text))
    return found


def ttls(client: redis.Redis) -> dict[str, int]:
    """Seconds that an answer of each task is kept."""
    names = list(DEFAULT_TTL_S)
    values: Any = client.hmget(REGISTRY, [f"ttl:{name}" for name in names])
    return {
        name: int(value) if value is not None and value.isdigit() else DEFAULT_TTL_S[name]
        for name, value in zip(names, values, strict=True)
    }


def set_ttl(client: redis.Redis, task: str, seconds: int) -> None:
    """Keep a task's answers that long from now on; those in the cache end as they were stored."""
    field = f"ttl:{task}"
    while True:
        before: Any = client.hget(REGISTRY, field)
        if swap(client, field, before, str(seconds)):
            return


def adapt_ttls(
    client: redis.Redis, guard: Callable[[], None] = lambda: None, fence: int = 0
) -> list[dict[str, Any]]:
    """Give each task the TTL that fits its use since the last time this was done; what became of each.

    `guard` is called before each change. With a `fence`, a number that only grows, changes are refused once they were
    made with a larger one: a scheduled run that was overtaken can do no harm. Raises Overtaken.
    """
    used = dict.fromkeys(DEFAULT_TTL_S, 0)
    for key, counters in _counters(client):
        for task in used:
            total = counters.get(f"hits:{task}", 0) + counters.get(f"misses:{task}", 0)
            used[task] += total - counters.get(f"adapted:{task}", 0)
            if total:
                guard()
                _set(client, [key], fence, f"adapted:{task}", total)
    rows = []
    for task, before in ttls(client).items():
        after = adapt(before, used[task])
        if after != before:
            guard()
            _set(client, [REGISTRY, REGISTRY_VERSION], fence, f"ttl:{task}", after)
        rows.append({"task": task, "requests": used[task], "before_s": before, "ttl_s": after})
    return rows


def _set(client: redis.Redis, keys: list[Any], fence: int, field: str, value: int) -> None:
    """Set a field of the first key's hash. Raises Overtaken where that was set with a larger fence."""
    if not client.eval(_FENCED, len(keys), *keys, str(fence), field, str(value), EVENTS, EVENT):
        raise Overtaken


def _counters(client: redis.Redis) -> Iterator[tuple[bytes, dict[str, int]]]:
    for key in client.scan_iter(match=stats_pattern(), count=_PAGE):
        fields: Any = client.hgetall(key)
        yield key, {name.decode("utf-8", "replace"): int(value) for name, value in fields.items()}


def _row(key: str, entry: bytes, ttl_ms: int, size: int, text: bool) -> dict[str, Any]:
    head = read_head(entry)
    row: dict[str, Any] = {
        "key": key.rpartition(":")[2],
        "tenant": tenant_of(key),
        "task": head.task if head else None,
        "model": head.model if head else None,
        "age_s": round(max(0.0, time.time() - head.created), 1) if head else None,
        "ttl_s": round(ttl_ms / 1000, 1),
        "bytes": size,
    }
    if text:
        answer = decode(entry)
        row["text"] = answer.text if answer else None
    return row


def _model_of(head: bytes) -> str | None:
    found = read_head(head)
    return found.model if found else None


def _pages(keys: Iterable[bytes]) -> Iterator[list[bytes]]:
    rest = iter(keys)
    while page := list(islice(rest, _PAGE)):
        yield page


def _pipelined(client: redis.Redis, commands: list[tuple[Any, ...]]) -> list[Any]:
    with client.pipeline(transaction=False) as pipeline:
        for command in commands:
            pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
        return pipeline.execute()
