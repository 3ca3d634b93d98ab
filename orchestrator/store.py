"""Redis: its connections, its health, and the one place where key names are made.

Redis away never changes readiness: it is reported, and whoever uses it says what happens without it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

from orchestrator.redis_connection import Argument, Connection, OnDropped, StoreAway, StoreError
from orchestrator.redis_url import address_of
from orchestrator.settings import mask_url

__all__ = ["Argument", "Script", "Store", "StoreAway", "StoreError"]

log = logging.getLogger(__name__)

NAMES = 4096  # of keys that are remembered, not made again
WATCH_S = 0.25  # between two pings, and between two attempts to connect

# hash: "key:<id>" and "limits:<subject>" -> JSON, "ttl:<task>" -> seconds, "drain:<URL of a server>" -> Unix time
REGISTRY = "truthgpt:{registry}"
REGISTRY_VERSION = "truthgpt:{registry}:version"  # counter, raised with every change of the registry
BREAKERS = "truthgpt:breakers"  # hash: model -> JSON
EVENTS = "truthgpt:events"  # channel of JSON objects
JOBS = "truthgpt:{jobs}"  # hash: "<job>:<field>" -> what jobs/ledger.py says

_PLAIN = re.compile(r"[A-Za-z0-9._:-]+").fullmatch


@lru_cache(maxsize=NAMES)
def limits_key(tenant: str, subject: str, endpoint: str) -> str:
    """Hash: what one caller has used at one endpoint. Raises ValueError, as all these do, for an empty name."""
    return f"{_tenant(tenant)}:l:{_part(subject)}:{quote(endpoint, safe='')}"


@lru_cache(maxsize=NAMES)
def leases_key(tenant: str, subject: str) -> str:
    """Sorted set: the running requests of one caller."""
    return f"{_tenant(tenant)}:n:{_part(subject)}"


def answer_key(tenant: str, digest: str) -> str:
    """A cached answer."""
    return f"{_tenant(tenant)}:c:{_part(digest)}"


def flight_key(tenant: str, digest: str) -> str:
    """Which worker is generating this answer now."""
    return f"{_tenant(tenant)}:f:{_part(digest)}"


@lru_cache(maxsize=NAMES)
def stats_key(tenant: str) -> str:
    """Hash: the cache's counters of one tenant."""
    return f"{_tenant(tenant)}:s"


def answer_pattern(tenant: str | None = None, digest: str = "") -> str:
    """Glob for SCAN: the cached answers of one tenant, or of all, whose digest begins so."""
    return f"{'truthgpt:{*}' if tenant is None else _tenant(tenant)}:c:{quote(digest)}*"


def stats_pattern() -> str:
    """Glob for SCAN: the counters of every tenant."""
    return "truthgpt:{*}:s"


def tenant_of(key: str) -> str:
    """Whose a key is."""
    return unquote(key.partition("{")[2].partition("}")[0])


def lease_key(job: str) -> str:
    """Who runs a job now; it ends by itself."""
    return f"truthgpt:{{jobs}}:lease:{_part(job)}"


def history_key(job: str) -> str:
    """List of JSON objects: a job's last runs, newest first."""
    return f"truthgpt:{{jobs}}:history:{_part(job)}"


def users_key(minute: int) -> str:
    """HyperLogLog: the callers of one minute since 1970."""
    return f"truthgpt:{{users}}:{minute}"


def told_key(alert: str) -> str:
    """That a replica has sent, or is sending, a message about an alert; it ends by itself."""
    return f"truthgpt:told:{_part(alert)}"


def worker_channel(worker: str) -> str:
    """Channel on which one worker is asked for the answers it is generating."""
    return f"truthgpt:worker:{_part(worker)}"


@lru_cache(maxsize=NAMES)
def _tenant(tenant: str) -> str:
    # The braces are Redis Cluster's hash tag: all keys of one request are in one slot.
    return f"truthgpt:{{{_part(tenant)}}}"


def _part(text: str) -> str:
    """A part of a key; other characters are percent-encoded, so that no part can pretend to be two."""
    if not text:
        raise ValueError("a part of a key is empty")
    return text if _PLAIN(text) else quote(text, safe=":")


class Script:
    """A Lua script and the SHA-1 by which Redis knows it (EVALSHA)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Store:
    """One Redis. `timeout_s` bounds every call; `url` is redis://, rediss:// or unix:// as redis-py reads it.

    One connection carries all commands and a second one the subscriptions; they come and go together. `up` is False at
    once after a deadline passed or a connection was lost, and True again after Redis has answered a ping.
    """

    def __init__(self, url: str, timeout_s: float, worker: str | None = None) -> None:
        self.url = mask_url(url)
        self.worker = worker or secrets.token_hex(8)
        self.up = False
        self.on_up: list[Callable[[], None]] = []  # called whenever Redis is up (again), subscriptions included
        self._address = address_of(url)
        self._timeout_s = timeout_s
        self._commands: Connection | None = None
        self._listener: Connection | None = None
        self._handlers: dict[bytes, list[Callable[[bytes], None]]] = {}
        self._told: bool | None = None

    async def call(self, *args: Argument, timeout_s: float | None = None) -> Any:
        """One command; its reply as bytes, int, None or a list of such.

        Raises StoreAway (at once while not up) and StoreError. Should `timeout_s` pass, Redis is away for everyone.
        """
        return await self._connection().send(*args, timeout_s=timeout_s)

    async def run_script(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run a script in one round trip; in two, each with its deadline, when Redis does not know it yet.

        Raises as `call` does.
        """
        return await self.script(script, keys, args)

    def script(
        self, script: Script, keys: Sequence[str], args: Sequence[Argument], dropped: OnDropped | None = None,
        lazy: bool = False,
    ) -> asyncio.Future[Any]:  # fmt: skip
        """The same as a future. If that is cancelled, `dropped` gets the reply when it comes. Raises StoreAway.

        A `lazy` one may wait a few milliseconds for company on its way.
        """
        return self._connection().run(script.text, script.sha, (len(keys), *keys, *args), dropped, lazy)

    def script_only(
        self, script: Script, keys: Sequence[str], args: Sequence[Argument], lazy: bool = False
    ) -> None:
        """Run a script whose reply nobody waits for. Raises StoreAway."""
        self._connection().run_only(script.text, script.sha, (len(keys), *keys, *args), lazy)

    def _connection(self) -> Connection:
        if not self.up or self._commands is None:
            raise StoreAway("Redis is away")
        return self._commands

    def publish(self, channel: str, payload: bytes) -> None:
        """Send a message with the next write. Best effort: never waits, never raises; lost while Redis is away."""
        if not self.up or self._commands is None:
            return
        try:
            self._commands.send_only("PUBLISH", channel, payload)
        except StoreAway as error:
            log.debug("a message to %s is lost: %s", channel, error)

    def subscribe(self, channel: str, handler: Callable[[bytes], None]) -> Callable[[], None]:
        """Call `handler(payload)` on the loop for every message from now on; what is returned ends that.

        Subscriptions outlive reconnections; what was published meanwhile is lost. What a handler raises is logged.
        """
        name = channel.encode()
        self._handlers.setdefault(name, []).append(handler)
        if len(self._handlers[name]) == 1:
            self._tell_listener("SUBSCRIBE", name)

        def unsubscribe() -> None:
            handlers = self._handlers.get(name, [])
            if handler in handlers:
                handlers.remove(handler)
                if not handlers:
                    del self._handlers[name]
                    self._tell_listener("UNSUBSCRIBE", name)

        return unsubscribe

    async def run(self) -> None:
        """Keep the connections until cancelled. Logs one line whenever Redis comes or goes."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                await self._session()
            except (StoreAway, StoreError) as error:
                self._tell(False, str(error))
            # At once after a long session: a hiccup costs little. Else at most every WATCH_S.
            await asyncio.sleep(max(0.0, began + WATCH_S - loop.time()))

    async def _session(self) -> None:
        """From connecting until a connection is lost. Raises StoreAway or StoreError with the reason, always."""
        commands = listener = None
        try:
            commands = await Connection.open(self._address, self._timeout_s, on_lost=self._went)
            listener = self._listener = await Connection.open(
                self._address, self._timeout_s, on_message=self._dispatch, on_lost=self._went
            )
            for channel in list(self._handlers):
                await listener.send("SUBSCRIBE", channel)
            await commands.send("PING")
            self._commands, self.up = commands, True
            self._tell(True)
            for hook in self.on_up:
                _guarded(hook)
            while True:
                losses = (commands.lost, listener.lost)
                await asyncio.wait(losses, timeout=WATCH_S, return_when=asyncio.FIRST_COMPLETED)
                for connection in (commands, listener):
                    if connection.idle:  # else the deadlines of its commands watch it
                        await connection.send("PING")  # raises with the reason where the connection is lost
        finally:
            self.up, self._commands, self._listener = False, None, None
            for opened in (commands, listener):
                if opened is not None:
                    opened.close()

    def _went(self) -> None:
        self.up = False

    def _tell_listener(self, command: str, channel: bytes) -> None:
        if self._listener is not None:
            try:
                self._listener.send_only(command, channel)
            except StoreAway as error:
                self._listener.close(str(error))  # the next session subscribes to everything anew

    def _dispatch(self, channel: bytes, payload: bytes) -> None:
        for handler in tuple(self._handlers.get(channel, ())):
            _guarded(handler, payload)

    def _tell(self, up: bool, reason: str = "") -> None:
        if up != self._told:
            self._told = up
            if up:
                log.info("Redis %s is up", self.url)
            else:
                log.warning("Redis %s is away: %s", self.url, reason)


def _guarded(function: Callable[..., None], *args: Any) -> None:
    try:
        function(*args)
    except Exception:  # whatever a subscriber does wrong is no reason to lose Redis for everybody else
        log.exception("a handler of Redis's messages failed")
