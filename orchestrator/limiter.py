"""A request's one round trip to Redis: counted in the caller's limits and looked up in the cache, in one script.

Without Redis the limits are as `loss` says, and the cache is what this process is generating at the moment.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from orchestrator.cache import CACHE_LUA, LEAVE, Lookup, Ticket, lookup_of
from orchestrator.domain import Caller, Limits, Notes
from orchestrator.errors import InvalidRequest, LimitsUnavailable, RateLimited, Text
from orchestrator.limits import (
    LIMITS_LUA,
    RENEW,
    RENEW_S,
    SETTLE,
    Verdict,
    nothing_to_settle,
    reserve_args,
    settle_args,
    verdict,
)
from orchestrator.limits_local import LocalLimits
from orchestrator.store import Script, Store, StoreAway, StoreError, leases_key, limits_key

log = logging.getLogger(__name__)

ENTER = Script(
    LIMITS_LUA
    + CACHE_LUA
    + """
local said = false
if ARGV[1] ~= '' then
  said = limits_reserve(KEYS[1], KEYS[2], ARGV[1])
  if said[1] == 0 then return {said, false} end
end
if ARGV[2] == '' then return {said, false} end
return {said, cache_enter(KEYS[3], KEYS[4], KEYS[5], ARGV[2])}
"""
)


@dataclass(slots=True)
class Entry:
    """A request that was let in. `verdict` is None where no limit applies, `lookup` None where nothing is cached."""

    caller: Caller
    endpoint: str
    lease: str
    keys: tuple[str, str]  # in Redis: what the caller used at the endpoint, and its leases
    verdict: Verdict | None = None
    lookup: Lookup | None = None
    local: bool = False  # counted in this process only


class Limiter:
    """`mode`: enforce, shadow or off; `loss`: fail_open, fail_closed or local; `workers` share a local limit."""

    def __init__(
        self, store: Store | None, mode: str, loss: str, workers: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self._mode, self._loss, self._workers, self._clock = store, mode, loss, workers, clock
        self._local = LocalLimits()
        self._leases: dict[str, str] = {}  # lease -> key of its caller's leases in Redis
        self._own_leases: dict[str, str] = {}  # lease -> its caller, counted in this process
        self.degraded = False  # the last request with limits was decided without Redis
        self.without_redis = 0  # requests of which that is true

    async def enter(
        self, caller: Caller, endpoint: str, tokens: int, lease: str, ticket: Ticket | None, notes: Notes,
        recount: Callable[[], Awaitable[int]] | None = None,
    ) -> Entry:  # fmt: skip
        """Count a request that may use `tokens`, look up its answer. Raises RateLimited, LimitsUnavailable.

        `tokens` may be a bound, and `recount` then knows better. It takes its time, so that it is asked only where it
        makes a difference.
        """
        if recount is None:
            return await self._enter(caller, endpoint, tokens, lease, ticket, notes)
        if self._mode == "enforce":
            try:
                return await self._enter(caller, endpoint, tokens, lease, ticket, notes)
            except (RateLimited, InvalidRequest):
                if notes.refused is None or not notes.refused.startswith("tokens"):
                    raise
        notes.refused = None
        return await self._enter(caller, endpoint, await recount(), lease, ticket, notes)

    async def _enter(
        self, caller: Caller, endpoint: str, tokens: int, lease: str, ticket: Ticket | None, notes: Notes
    ) -> Entry:
        limits = Limits() if self._mode == "off" else caller.limits
        keys = (limits_key(caller.tenant, caller.id, endpoint), leases_key(caller.tenant, caller.id))
        entry = Entry(caller, endpoint, lease, keys)
        limited = limits != Limits()
        if not limited and ticket is None:
            return entry
        try:
            await self._ask(entry, limits if limited else None, tokens, ticket)
        except (StoreAway, StoreError) as error:
            if isinstance(error, StoreError):
                log.error("Redis refuses the script of limits and cache: %s", error)
            entry.lookup = None if ticket is None else Lookup.local() if ticket.policy.store else Lookup("bypass")
            if limited:
                self._without_redis(entry, limits, tokens)
        else:
            self.degraded = self.degraded and not limited
        self._judge(entry, tokens, notes)
        return entry

    def leave(self, entry: Entry, tokens: int) -> None:
        """Settle: `tokens` were really used, and the caller's place is free again. Never waits."""
        counted = entry.verdict
        if counted is None or nothing_to_settle(entry.caller.limits):
            return
        if entry.local:
            self._own_leases.pop(entry.lease, None)
            self._local.settle(entry.caller.id, entry.endpoint, counted, tokens, entry.lease)
            return
        self._leases.pop(entry.lease, None)
        if self._store is not None:
            try:
                # a lease is given back at once: the next request may come to another worker
                lazy = not entry.caller.limits.concurrency
                self._store.script_only(SETTLE, entry.keys, settle_args(counted, tokens, entry.lease), lazy)
            except StoreAway as error:  # what was reserved stays reserved until its window has passed
                log.info("a request could not be settled: %s", error)

    async def run(self) -> None:
        """Renew the leases of long requests until cancelled."""
        while True:
            await asyncio.sleep(RENEW_S)
            for lease, subject in self._own_leases.items():
                self._local.renew(subject, lease, self._clock())
            by_key: dict[str, list[str]] = {}
            for lease, key in self._leases.items():
                by_key.setdefault(key, []).append(lease)
            for key, leases in by_key.items():
                running = [lease for lease in leases if lease in self._leases]  # one given back may not come again
                try:
                    if self._store is not None and running:
                        await self._store.run_script(RENEW, [key], running)
                except (StoreAway, StoreError) as error:
                    log.info("leases of running requests could not be renewed: %s", error)

    async def _ask(self, entry: Entry, limits: Limits | None, tokens: int, ticket: Ticket | None) -> None:
        store = self._store
        if store is None:
            raise StoreAway("no Redis is configured")
        packed = b""
        if limits is not None:
            packed = reserve_args(limits, tokens=tokens, lease=entry.lease, enforce=self._mode == "enforce")
        keys, wanted = [*entry.keys], b""
        if ticket is not None:
            keys += ticket.keys()
            wanted = ticket.args(store.worker)
        # A caller who leaves meanwhile would otherwise leave behind what was reserved, and the lock.
        dropped = partial(self._dropped, store, entry, limits, ticket)
        said, found = await store.script(ENTER, keys, [packed, wanted], dropped)
        if limits is not None:
            self._reserved(entry, limits, said)
        if found:
            entry.lookup = lookup_of(found)

    def _reserved(self, entry: Entry, limits: Limits, said: Any) -> None:
        entry.verdict = verdict(said, limits)
        if limits.concurrency and entry.verdict.accepted:
            self._leases[entry.lease] = entry.keys[1]

    def _dropped(
        self, store: Store, entry: Entry, limits: Limits | None, ticket: Ticket | None, reply: Any
    ) -> None:
        said, found = reply
        if limits is not None:
            self._reserved(entry, limits, said)
            self.leave(entry, 0)
        # without a look-up somebody else may hold the lock
        if found and ticket is not None and ticket.policy.lookup and lookup_of(found).state == "lead":
            try:
                store.script_only(LEAVE, ticket.keys(), [store.worker, "", 1, ""])
            except StoreAway as error:  # it ends by itself
                log.debug("a lock could not be given back: %s", error)

    def _without_redis(self, entry: Entry, limits: Limits, tokens: int) -> None:
        self.degraded = True
        self.without_redis += 1
        if self._store is not None:
            if self._loss == "fail_closed" and self._mode == "enforce":
                raise LimitsUnavailable
            if self._loss == "fail_open":
                return
        own = replace(limits, **{name: math.ceil(value / self._workers) for name, value in vars(limits).items()})
        enforce = self._mode == "enforce"
        entry.local = True
        entry.verdict = self._local.reserve(
            entry.caller.id, entry.endpoint, own, tokens=tokens, lease=entry.lease, enforce=enforce, now=self._clock()
        )
        if own.concurrency and entry.verdict.accepted:
            self._own_leases[entry.lease] = entry.caller.id

    def _judge(self, entry: Entry, tokens: int, notes: Notes) -> None:
        said = entry.verdict
        if said is None:
            return
        notes.windows = said.windows
        if said.refused is not None:
            if said.accepted:
                notes.shadow = said.refused.name
            else:
                notes.refused = said.refused.name
                if said.refused.name.startswith("tokens") and tokens > said.refused.limit:
                    raise _never(entry.endpoint, tokens, said.refused.limit)
                raise RateLimited(said.refused.name, said.refused.limit, said.retry_after_s)


def _never(endpoint: str, tokens: int, limit: int) -> InvalidRequest:
    if endpoint in ("embed", "classify"):
        return InvalidRequest(
            Text(
                f"text_input: these texts may have {tokens} tokens, and your limit is {limit}: send fewer at a time.",
                f"text_input: estos textos pueden tener {tokens} tokens y su límite es {limit}: envíe menos a la vez.",
            ),
            "text_input",
        )
    return InvalidRequest(
        Text(
            f"max_tokens: this request may use {tokens} tokens, prompt and answer, and your limit is {limit}.",
            f"max_tokens: esta petición puede usar {tokens} tokens, entre texto y respuesta, y su límite es {limit}.",
        ),
        "max_tokens",
    )
