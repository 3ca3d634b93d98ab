"""One pipelined connection to Redis (RESP2): what is sent in one tick of the loop leaves in one write. What nobody
hurries for leaves with the next command, at the latest after LAZY_S: to wake Redis costs more than most commands do.

Every command has a deadline. A reply that is late cannot be told from one that never comes, and those behind it could
no longer be matched: a deadline that passes ends the connection for everyone on it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import select
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import hiredis

log = logging.getLogger(__name__)

CONNECT_S = 1.0  # nobody waits for a connection, so that it may take longer than a command
MAX_PENDING = 10_000
LAZY_S = 0.002
SPIN_S = 0.0002
LOOK_AGAIN_S = 0.001

Argument = bytes | str | int | float
OnMessage = Callable[[bytes, bytes], None]
OnDropped = Callable[[Any], None]


class StoreAway(Exception):
    """Redis did not answer within the deadline, or is known to be away. Whoever calls says what then happens."""


class StoreError(Exception):
    """Redis answered with an error; its text begins with Redis's code, such as NOSCRIPT or OOM."""


@dataclass(frozen=True)
class Address:
    """Where a Redis listens and how to enter: a Unix socket's `path`, else `host` and `port`, with `tls` or without."""

    path: str | None = None
    host: str = "localhost"
    port: int = 6379
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0


class _Pending:
    """A command without its reply. Nobody waits for it where `reply` is None.

    `instead` is what to send where Redis does not know the script that the command names; `dropped` gets the reply
    that whoever waited for it does not want any more.
    """

    __slots__ = ("reply", "timeout_s", "deadline", "instead", "dropped")

    def __init__(
        self, reply: asyncio.Future[Any] | None, timeout_s: float, instead: tuple[Argument, ...] = (),
        dropped: OnDropped | None = None,
    ) -> None:  # fmt: skip
        self.reply, self.timeout_s, self.instead, self.dropped = reply, timeout_s, instead, dropped
        self.deadline = math.inf  # it runs from when the command is written


class Connection(asyncio.Protocol):
    """A connection that is open, authenticated and in its database until `lost` is done. Make it with `open`."""

    def __init__(
        self, timeout_s: float, on_message: OnMessage | None = None, on_lost: Callable[[], None] | None = None
    ):
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[str] = self._loop.create_future()  # why it ended
        self._timeout_s, self._on_message, self._on_lost = timeout_s, on_message, on_lost
        self._reader = hiredis.Reader(replyError=StoreError)
        self._transport: asyncio.Transport  # from connection_made on, which is before anybody else has this object
        self._pending: deque[_Pending] = deque()
        self._unsent: list[bytes] = []
        self._soon = self._later = False  # whether what is unsent will leave in this tick, and whether after LAZY_S
        self._awake = False
        self._flushed_at = 0.0
        self._round_trip_s = SPIN_S / 2  # a running mean
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._late: _Pending | None = None  # the oldest command when a deadline was first seen to have passed
        self._grace_until = 0.0
        self._refused = False

    @classmethod
    async def open(
        cls,
        address: Address,
        timeout_s: float,
        on_message: OnMessage | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> Connection:
        """Connect, authenticate and select the database, within CONNECT_S altogether.

        `timeout_s` is the deadline of later commands. `on_message(channel, payload)` gets what is published to
        channels subscribed to here; `on_lost()` is called in the moment the connection ends. Raises StoreAway, and
        StoreError where Redis refuses the password or the database.
        """
        loop = asyncio.get_running_loop()

        def factory() -> Connection:
            return cls(timeout_s, on_message, on_lost)

        try:
            async with asyncio.timeout(CONNECT_S):
                if address.path is not None:
                    _, connection = await loop.create_unix_connection(factory, address.path)
                else:
                    _, connection = await loop.create_connection(factory, address.host, address.port, ssl=address.tls)
        except TimeoutError as error:
            raise StoreAway(f"no connection within {CONNECT_S:g} s") from error
        except OSError as error:
            raise StoreAway(str(error)) from error
        try:
            if address.password is not None:
                user = [address.username] if address.username is not None else []
                await connection.send("AUTH", *user, address.password, timeout_s=CONNECT_S)
            if address.db:
                await connection.send("SELECT", address.db, timeout_s=CONNECT_S)
        except BaseException:
            connection.close("not let in")
            raise
        return connection

    def send(self, *command: Argument, timeout_s: float | None = None) -> asyncio.Future[Any]:
        """Send a command with the next write; the future has its reply (bytes, int, None or a list of such).

        The future raises StoreAway or StoreError; cancelling it drops the reply. Raises StoreAway when the connection
        has ended or MAX_PENDING commands wait for their replies.
        """
        reply: asyncio.Future[Any] = self._loop.create_future()
        self._submit(command, _Pending(reply, timeout_s or self._timeout_s))
        return reply

    def send_only(self, *command: Argument) -> None:
        """Send a command whose reply nobody waits for. Raises as `send` does."""
        self._submit(command, _Pending(None, self._timeout_s))

    def run(
        self, script: str, sha: str, arguments: tuple[Argument, ...], dropped: OnDropped | None = None,
        lazy: bool = False,
    ) -> asyncio.Future[Any]:  # fmt: skip
        """Run a Lua script that Redis may know by its SHA-1 already; `arguments` begin with the number of keys.

        As `send`; a script that is unknown is sent again as a whole, with a deadline of its own. `dropped` gets the
        reply if the future was cancelled meanwhile. A `lazy` one may wait for company.
        """
        reply: asyncio.Future[Any] = self._loop.create_future()
        pending = _Pending(reply, self._timeout_s, ("EVAL", script, *arguments), dropped)
        self._submit(("EVALSHA", sha, *arguments), pending, lazy)
        return reply

    def run_only(self, script: str, sha: str, arguments: tuple[Argument, ...], lazy: bool = False) -> None:
        """The same without waiting for the reply."""
        pending = _Pending(None, self._timeout_s, ("EVAL", script, *arguments))
        self._submit(("EVALSHA", sha, *arguments), pending, lazy)

    @property
    def idle(self) -> bool:
        """Whether every command has been answered."""
        return not self._pending

    def close(self, reason: str = "closed") -> None:
        """End it now: everything pending fails with StoreAway(reason). A second time does nothing."""
        if self.lost.done():
            return
        self.lost.set_result(reason)
        self._transport.abort()  # what a stalled server does not read would keep a polite close waiting
        if self._timer is not None:
            self._timer.cancel()
        if self._on_lost is not None:
            self._on_lost()
        pending, self._pending = self._pending, deque()
        for command in pending:
            if command.reply is not None and not command.reply.done():
                command.reply.set_exception(StoreAway(reason))

    def _submit(self, command: tuple[Argument, ...], pending: _Pending, lazy: bool = False) -> None:
        if self.lost.done():
            raise StoreAway(self.lost.result())
        if len(self._pending) >= MAX_PENDING:
            raise StoreAway(f"{MAX_PENDING} commands are waiting for Redis")
        packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # its stub knows tuples of one only
        self._unsent.append(packed)
        self._pending.append(pending)
        if self._soon:
            return
        if not lazy:
            self._soon = True
            self._loop.call_soon(self._flush)
        elif not self._later:
            self._later = True
            self._loop.call_later(LAZY_S, self._flush_later)

    def _flush_later(self) -> None:
        self._later = False
        if self._unsent and not self._soon:
            self._flush()

    def _flush(self) -> None:
        hurried, self._soon = self._soon, False
        if self.lost.done():
            return
        now, soonest = time.monotonic(), math.inf  # uvloop's own time stands still while callbacks run
        for pending in islice(reversed(self._pending), len(self._unsent)):
            pending.deadline = now + pending.timeout_s
            soonest = min(soonest, pending.deadline)
        self._transport.write(b"".join(self._unsent))
        self._unsent.clear()
        self._flushed_at = now
        if hurried and not self._awake and self._round_trip_s < SPIN_S:
            self._awake = True
            self._loop.call_soon(self._stay_awake)
        if self._timer is None or soonest < self._timer_at:
            self._watch(soonest, now)

    def _stay_awake(self) -> None:
        """Keep the loop looking for the reply of a Redis that is near: to sleep and be woken takes as long as that, and
        more of the processor than looking does, which has to warm up again.
        """
        self._awake = bool(self._pending) and time.monotonic() < self._flushed_at + SPIN_S
        if self._awake:
            self._loop.call_soon(self._stay_awake)

    def _watch(self, when: float, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = self._loop.call_later(when - now, self._check), when

    def _check(self) -> None:
        """One timer for all: it stands at some deadline and is not moved when that reply comes."""
        self._timer = None
        now, soonest = time.monotonic(), min((pending.deadline for pending in self._pending), default=math.inf)
        if soonest > now:
            if soonest < math.inf:
                self._watch(soonest, now)
            return
        # Late may be this process and not Redis: what has arrived, or still has to leave, gets its turn first.
        if self._late is not self._pending[0]:
            self._late, self._grace_until = self._pending[0], now + self._timeout_s
        if now <= self._grace_until and self._socket_has_work():
            self._watch(now + LOOK_AGAIN_S, now)
        else:
            self.close("no answer within the deadline")

    def _socket_has_work(self) -> bool:
        wanted = select.POLLIN | (select.POLLOUT if self._transport.get_write_buffer_size() else 0)
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), wanted)
        return bool(poll.poll(0))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._round_trip_s += (time.monotonic() - self._flushed_at - self._round_trip_s) / 16
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not False:  # False: no complete reply any more
                if self._on_message is not None and type(reply) is list and reply[0] == b"message":
                    self._on_message(reply[1], reply[2])
                elif self._pending:
                    self._settle(self._pending.popleft(), reply)
                else:
                    self.close(f"an answer to nothing: {reply!r}")
        except hiredis.ProtocolError as error:
            self.close(f"not Redis's protocol: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.close(f"connection lost: {exc}" if exc else "connection lost")

    def _settle(self, pending: _Pending, reply: Any) -> None:
        if type(reply) is StoreError:
            self._settle_error(pending, reply)
        elif pending.reply is None:
            return
        elif not pending.reply.done():
            pending.reply.set_result(reply)
        elif pending.dropped is not None:  # its caller hung up
            pending.dropped(reply)

    def _settle_error(self, pending: _Pending, error: StoreError) -> None:
        if pending.instead and str(error).startswith("NOSCRIPT"):
            command, pending.instead = pending.instead, ()
            try:
                return self._submit(command, pending)
            except StoreAway as away:
                if pending.reply is not None and not pending.reply.done():
                    pending.reply.set_exception(away)
        elif pending.reply is None:
            if not self._refused:
                self._refused = True  # once a connection: it may concern every request
                log.warning("Redis refused a command that nobody waits for: %s", error)
        elif not pending.reply.done():
            pending.reply.set_exception(error)
