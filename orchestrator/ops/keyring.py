"""Writing keys and limits. Each change is one step in Redis and is announced to every worker with it.

The embedded Redis appends to its file every second: only a machine that fails in that second forgets a change.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import redis

from orchestrator import keys
from orchestrator.keys import Key, MalformedKey, PartialLimits
from orchestrator.store import EVENTS, REGISTRY, REGISTRY_VERSION

# Written only if nobody changed the field meanwhile, so that of two changes at the same time none is lost.
_SWAP = """
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then return 0 end
if ARGV[3] == '' then redis.call('HDEL', KEYS[1], ARGV[1]) else redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) end
redis.call('INCR', KEYS[2])
redis.call('PUBLISH', ARGV[4], ARGV[5])
return 1
"""
EVENT = json.dumps({"event": "registry"})


class KeyringError(Exception):
    """What was asked cannot be done; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def swap(client: redis.Redis, field: str, old: bytes | None, new: str | None) -> bool:
    """Replace a field of the registry if it still is `old`; None is no field. Announced to every worker."""
    arguments = (field, old or b"", new or "", EVENTS, EVENT)
    return bool(client.eval(_SWAP, 2, REGISTRY, REGISTRY_VERSION, *arguments))


class Keyring:
    """The keys and limits of one deployment. `clock` tells Unix seconds. Raises KeyringError and redis.RedisError."""

    def __init__(self, client: redis.Redis, clock: Callable[[], float] = time.time) -> None:
        self._client, self._clock = client, clock

    def create(
        self, tenant: str, scope: str = "inference", limits: PartialLimits | None = None,
        expires_s: float | None = None, note: str = "",
    ) -> tuple[Key, str]:  # fmt: skip
        """A new key and its credential, which nobody can read again. `expires_s` counts from now."""
        now = self._clock()
        while True:
            secret = keys.new_secret()
            key = Key(
                id=keys.new_id(), tenant=tenant, hash=keys.hash_of(secret), scope=scope, limits=dict(limits or {}),
                created=now, expires=None if expires_s is None else now + expires_s, note=note,
            )  # fmt: skip
            if swap(self._client, f"key:{key.id}", None, key.to_json()):
                return key, keys.credential(key.id, secret)

    def all(self, tenant: str | None = None) -> list[Key]:
        """Every key, or a tenant's, oldest first. A record that is malformed is left out."""
        found = []
        for name, value in self._client.hscan_iter(REGISTRY, match="key:*", count=500):
            try:
                key = keys.read(name.decode("utf-8", "replace").removeprefix("key:"), value)
            except MalformedKey:
                continue  # the workers log it
            if tenant is None or key.tenant == tenant:
                found.append(key)
        return sorted(found, key=lambda key: (key.created, key.id))

    def get(self, id: str) -> Key:
        return self._read(id)[0]

    def revoke(self, id: str) -> Key:
        """The key, refused from now on by every worker; once revoked it stays so."""
        now = self._clock()
        return self._change(id, lambda key: replace(key, revoked=now) if key.revoked is None else key)

    def rotate(self, id: str, grace_s: float = 0.0) -> tuple[Key, str]:
        """The key with a new secret, and its new credential; the secret before works for `grace_s` more seconds."""
        now, secret = self._clock(), keys.new_secret()

        def change(key: Key) -> Key:
            if key.state(now) != "active":
                raise KeyringError(f"key {id} is {key.state(now)}", "make a new one with `truthgpt keys create`")
            return key.rotated(secret, now, grace_s)

        return self._change(id, change), keys.credential(id, secret)

    def limits(self, subject: str) -> PartialLimits:
        """What `set_limits` has set for a key id or an address's subject."""
        return self._limits(subject)[0]

    def set_limits(self, subject: str, changes: Mapping[str, int | None]) -> PartialLimits:
        """All that is then set: `changes` over what was; None gives the field back to the key or the defaults."""
        while True:
            before, raw = self._limits(subject)
            after = {name: value for name, value in {**before, **changes}.items() if value is not None}
            if swap(self._client, f"limits:{subject}", raw, json.dumps(after) if after else None):
                return after

    def _change(self, id: str, change: Callable[[Key], Key]) -> Key:
        while True:
            before, raw = self._read(id)
            after = change(before)
            if after == before or swap(self._client, f"key:{id}", raw, after.to_json()):
                return after

    def _read(self, id: str) -> tuple[Key, bytes]:
        raw = self._client.hget(REGISTRY, f"key:{id}")
        if not isinstance(raw, bytes):
            raise KeyringError(f"there is no key {id}", "`truthgpt keys list` shows what there is")
        try:
            return keys.read(id, raw), raw
        except MalformedKey as error:
            raise KeyringError(f"the record of key {id} is malformed", "restore a backup, or make a new key") from error

    def _limits(self, subject: str) -> tuple[PartialLimits, bytes | None]:
        raw = self._client.hget(REGISTRY, f"limits:{subject}")
        if not isinstance(raw, bytes):
            return {}, None
        try:
            return keys.read_limits(raw), raw
        except MalformedKey:
            return {}, raw  # it counts as missing everywhere, and what is set now takes its place
