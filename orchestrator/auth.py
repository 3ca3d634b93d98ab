"""Who is asking: from a credential and an address to a Caller. No request waits for Redis here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from orchestrator import keys
from orchestrator.domain import Caller, Limits
from orchestrator.errors import KeysUnavailable, PermissionDenied, Unauthenticated
from orchestrator.keys import Key
from orchestrator.registry import Registry

MAX_KNOWN = 10_000


class _Known(NamedTuple):
    """What a credential was found to be. `own`: the limits set for it beside its key's."""

    caller: Caller
    key: Key
    own: keys.PartialLimits


class Auth:
    """`mode` keys: every caller needs a valid key. open: who has none is known by the address.

    `defaults` are the limits of everyone for whom nothing else is set; `clock` tells Unix seconds.
    """

    def __init__(self, mode: str, registry: Registry, defaults: Limits, clock: Callable[[], float] = time.time) -> None:
        self._open = mode == "open"
        self._registry, self._defaults, self._clock = registry, defaults, clock
        self._known: dict[str, _Known] = {}

    def caller(self, credential: str | None, address: str) -> Caller:
        """The caller. Raises Unauthenticated, or KeysUnavailable when Redis is away and the key may well be good.

        Where running open a credential that no key can have counts as none: many clients must send something.
        """
        key = None
        if credential is not None:
            known = self._known.get(credential)
            if known is not None and self._stands(known):
                return known.caller
            key = self._key(credential)
        if key is not None and credential is not None:
            own = self._registry.limits_of(key.id)
            limits = keys.merged(self._defaults, key.limits, own)
            caller = Caller(key.id, key.tenant, key.scope, limits)
            if key.old_hash is None:  # of two secrets that are valid nobody could say later which one this was
                if len(self._known) >= MAX_KNOWN:
                    self._known.clear()
                self._known[credential] = _Known(caller, key, own)
            return caller
        if self._open:
            subject = keys.subject_of(address)
            limits = keys.merged(self._defaults, self._registry.limits_of(subject))
            return Caller(subject, keys.OPEN_TENANT, "inference", limits)
        raise self._refusal("no credential" if credential is None else "unknown key", given=credential is not None)

    def admin(self, credential: str | None) -> Caller:
        """The caller with an admin's key, which is asked for in every mode.

        Raises Unauthenticated, KeysUnavailable, or PermissionDenied for another key.
        """
        key = self._key(credential) if credential is not None else None
        if key is None:
            raise self._refusal("no credential" if credential is None else "unknown key", given=credential is not None)
        if key.scope != "admin":
            raise PermissionDenied(detail=f"key {key.id} has the scope {key.scope}")
        return self.caller(credential, "")

    def _stands(self, known: _Known) -> bool:
        """Whether what was found out about a credential still holds: the registry's copy of its key is the same."""
        key, registry = known.key, self._registry
        return (
            registry.key(key.id) is key
            and registry.limits_of(key.id) == known.own
            and key.state(self._clock()) == "active"
        )

    def _key(self, credential: str) -> Key | None:
        """The valid key of this credential, None when there is no such id. Every credential takes the same path."""
        now = self._clock()
        id, secret = keys.split(credential) or ("", "")
        found = self._registry.key(id)
        key = found or keys.NOBODY
        taken, state = key.takes(secret, now), key.state(now)
        if found is None:
            return None
        if not taken:
            raise self._refusal(f"wrong secret of key {key.id}", given=True)
        if state != "active":
            raise Unauthenticated(detail=f"key {key.id} is {state}")
        return key

    def _refusal(self, detail: str, given: bool) -> Unauthenticated | KeysUnavailable:
        """Only a copy that agrees with Redis can say that a key does not exist: it may just have been made."""
        if given and not self._registry.fresh:
            return KeysUnavailable()
        return Unauthenticated(detail=detail)
