"""HTTP/1.1 to one server: connections that are kept, one request at a time on each, answers read as they come.

A general client costs more than all rules of the gateway together. This one speaks what Triton's server speaks and no
more: no redirects, cookies, codings or proxies.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Protocol, cast

import httptools

IDLE_S = 30.0  # a connection unused for longer is not used again: the other end may be about to close it
EVENTS_TYPE = "text/event-stream"
DRAIN_S = 1.0  # for the end of a response that nobody reads any more, before its connection is given up
HIGH_BYTES = 256 << 10  # received and not yet read: above this nothing more is taken from the socket


class ConnectionFailed(OSError):
    """A connection could not be had, was lost, or what came is not HTTP."""


class Reader(Protocol):
    """Who is handed an answer's events as they come; see reading.Reading."""

    def feed(self, data: bytes) -> bool: ...
    def until(self, heard_at: float) -> float: ...
    def late(self) -> Exception: ...


class Answer:
    """One response while it is received. Whoever reads it closes it, at its end or before.

    `status` and `headers` (lower-case names) are there once `begun()` returns. `heard_at` is the loop time of the
    last bytes.
    """

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.heard_at = 0.0
        self._connection, self._loop = connection, loop
        self._parts: list[bytes] = []
        self._size = 0
        self._begun = self._complete = self._closed = self._failed = False
        self._read = False  # its reader wants no more of it
        self._error: Exception | None = None
        self._reader: Reader | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._until = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    async def begun(self, until: float) -> None:
        """Wait for the status and the headers. Raises as `read` does."""
        while not self._begun:
            await self._wait(until)

    async def read(self, until: float) -> bytes:
        """The next bytes of the body, empty at its end.

        Raises TimeoutError when there are none by a loop time, ConnectionFailed, or what `fail` was given.
        """
        while True:
            if self._error is not None:
                raise self._error
            if self._parts:
                data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                self._parts.clear()
                if self._size > HIGH_BYTES:
                    self._connection.resume()
                self._size = 0
                return data
            if self._complete:
                return b""
            await self._wait(until)

    async def hand_to(self, reader: Reader) -> bool:
        """Give the reader the body piece by piece as it comes, until it wants no more.

        False where the answer is no stream of events: its body is to be read then. To be called at once after the
        request was sent. Raises ConnectionFailed, what the reader raises or a delay means, or what `fail` was given.
        """
        self._reader = reader
        self._look()
        if self._error is None:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = self._reader = None
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback has this frame: a cycle
        return self._read

    def fail(self, error: Exception) -> None:
        """End it with this error, wherever it is waited for; only the first one counts."""
        if not self._failed:
            self._failed, self._error = True, error
            self._wake()

    def close(self) -> None:
        """Done with it. Its connection is kept if the response has come to its end."""
        if not self._closed:
            self._end()
            self._connection.leave(self._complete and not self._failed)

    def finish(self) -> None:
        """Done with it, and its end is about to come: the connection is kept if it does so soon."""
        if self._complete or self._failed or self._closed:
            self.close()
        else:
            self._end()
            self._connection.drain()

    def _end(self) -> None:
        self._closed = True
        self._parts.clear()
        if self._size > HIGH_BYTES:
            self._connection.resume()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _wait(self, until: float) -> None:
        if self._error is not None:
            raise self._error
        if until <= self._loop.time():
            raise TimeoutError
        self._until = until
        # One timer for all waits of a response: it stands where it is while the deadline moves away.
        if self._timer is None or until < self._timer_at:
            self._watch()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _watch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = self._loop.call_at(self._until, self._check), self._until

    def _check(self) -> None:
        self._timer = None
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self._loop.time() >= self._until:
            waiter.set_exception(TimeoutError())
        else:
            self._watch()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _look(self) -> None:
        """One timer for all waits of a reader, too."""
        self._timer = None
        reader = self._reader
        if reader is None:
            return
        until = reader.until(self.heard_at)
        if self._loop.time() >= until:
            self.fail(reader.late())
        else:
            self._timer = self._loop.call_at(until, self._look)

    def _feed(self, reader: Reader, data: bytes) -> None:
        try:
            self._read = reader.feed(data)
        except Exception as error:
            self._reader = None
            self.fail(error)
            return
        if self._read:
            self._reader = None
            self._wake()

    def take_head(self, status: int, headers: dict[str, str]) -> None:
        self.status, self.headers, self._begun = status, headers, True
        if self._reader is None:
            self._wake()
        elif status != 200 or not headers.get("content-type", "").startswith(EVENTS_TYPE):
            self._reader = None
            self._wake()

    def take(self, data: bytes) -> None:
        if self._closed or self._read:
            return
        self.heard_at = self._loop.time()
        if self._reader is not None:
            self._feed(self._reader, data)
            return
        self._parts.append(data)
        self._size += len(data)
        if self._size > HIGH_BYTES:
            self._connection.pause()
        self._wake()

    def take_end(self) -> None:
        self._complete = True
        if self._reader is not None:
            self._feed(self._reader, b"")
        else:
            self._wake()


class Connection(asyncio.Protocol):
    """One connection of a pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._answer: Answer | None = None
        self._draining: asyncio.TimerHandle | None = None
        self._keep = False
        self.lost = False
        self.idle_since = 0.0

    def send(self, request: bytes) -> Answer:
        self._answer = answer = Answer(self, self._loop)
        self._transport.write(request)
        return answer

    def leave(self, complete: bool) -> None:
        """Its answer is closed: keep the connection, or hang up."""
        self._answer = None
        if complete and self._keep and not self.lost:
            self.idle_since = self._loop.time()
            self._pool.put(self)
        else:
            self.close()

    def drain(self) -> None:
        """Its answer is closed just before its end."""
        self._draining = self._loop.call_later(DRAIN_S, self.close)

    def close(self) -> None:
        self.lost = True
        self._transport.abort()

    def pause(self) -> None:
        self._transport.pause_reading()

    def resume(self) -> None:
        self._transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._pool.connections.add(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionFailed(f"not HTTP: {error!r}"))
            self.close()

    def eof_received(self) -> None:
        self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._pool.connections.discard(self)
        if self._draining is not None:
            self._draining.cancel()
        self._fail(ConnectionFailed(f"the connection was lost: {exc}" if exc else "the connection was closed"))
        del self._parser  # it has this connection's methods: only the garbage collector would free the two

    def _fail(self, error: ConnectionFailed) -> None:
        if self._answer is not None:
            self._answer.fail(error)

    def on_message_begin(self) -> None:
        self._headers = {}
        if self._answer is None:  # an answer to nothing
            self.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._answer is not None:
            self._answer.take_head(self._parser.get_status_code(), self._headers)

    def on_body(self, body: bytes) -> None:
        if self._answer is not None:
            self._answer.take(body)

    def on_message_complete(self) -> None:
        self._keep = self._parser.should_keep_alive()  # it has forgotten by the next call
        if self._draining is not None:
            self._draining.cancel()
            self._draining = None
            self.leave(True)
        elif self._answer is not None:
            self._answer.take_end()


class Pool:
    """Connections to one server, as many as there are requests at once; the one used last is used next."""

    def __init__(self, host: str, port: int, connect_s: float) -> None:
        self._host, self._port, self._connect_s = host, port, connect_s
        shown = f"[{host}]" if ":" in host else host
        self._host_field = f"host: {shown}:{port}\r\n"
        self._idle: list[Connection] = []
        self.connections: set[Connection] = set()
        self._closed = False

    async def request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], within_s: float = math.inf
    ) -> Answer:
        """Send a request and return its answer, of which nothing may have come yet.

        Raises ConnectionFailed, also when no connection is had within `connect_s`, or `within_s` if that is shorter.
        """
        lines = f"{method} {path} HTTP/1.1\r\n{self._host_field}"
        for name, value in headers.items():
            lines += f"{name}: {value}\r\n"
        if body is not None:
            lines += f"content-length: {len(body)}\r\n"
        head = f"{lines}\r\n".encode("latin-1")
        connection = self._take() or await self._connect(min(self._connect_s, within_s))
        return connection.send(head + body if body else head)

    def put(self, connection: Connection) -> None:
        if self._closed:
            connection.close()
        else:
            self._idle.append(connection)

    def close(self) -> None:
        self._closed = True
        for connection in tuple(self.connections):
            connection.close()

    def _take(self) -> Connection | None:
        oldest = asyncio.get_running_loop().time() - IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.lost:
                continue
            if connection.idle_since >= oldest:
                return connection
            # All that are left have been idle for longer still.
            for idle in (connection, *self._idle):
                idle.close()
            self._idle.clear()
        return None

    async def _connect(self, within_s: float) -> Connection:
        if self._closed:
            raise ConnectionFailed("the client is closed")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(within_s):
                _, connection = await loop.create_connection(lambda: Connection(self), self._host, self._port)
        except TimeoutError as error:
            raise ConnectionFailed(f"no connection within {within_s:g} s") from error
        except OSError as error:
            raise ConnectionFailed(str(error)) from error
        return connection
