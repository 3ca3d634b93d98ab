"""HTTP/1.1 for measuring: keep-alive connections, moments taken where bytes come out of the socket, bounded memory.

A new connection is part of the request that needs it. None is used again that was idle for longer than IDLE_S, which is
less than servers keep one, and no request is sent twice: what a user would see as an error is one here.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import cast

import httptools

from orchestrator.bench import kserve, openai
from orchestrator.bench.answers import Answer, BenchError, Fault, Reader
from orchestrator.bench.plan import Load, Prompt, Target

MAX_HEAD_BYTES = 64 << 10
MAX_BYTES = 80 << 20  # of a whole answer with all that is around its body
CONNECT_S = 10.0
IDLE_S = 2.0


class HttpWire:
    """An endpoint asked over HTTP/1.1, a connection for each request that is under way. `close` it."""

    def __init__(self, target: Target, load: Load) -> None:
        self._target, self._load = target, load
        self._dialect = openai if target.protocol == "openai" else kserve
        self._head = _head(target, self._dialect.path(target))
        self._tls = tls_context(target) if target.tls else None
        self._idle: list[Connection] = []

    async def ask(self, prompt: Prompt, tokens: int, answer: Answer) -> None:
        """One request; `answer` is filled as it comes. Raises Fault."""
        body = self._dialect.body(self._target, self._load, prompt, tokens)
        request = b"%s%d\r\n\r\n%s" % (self._head, len(body), body)
        connection = self._reused() or await self._opened()
        try:
            await connection.ask(request, self._dialect.reader(self._target, answer))
        finally:
            if connection.usable:  # after an error that was answered in order, too
                self._idle.append(connection)

    async def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    def _reused(self) -> Connection | None:
        now = time.perf_counter()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and now - connection.idle_since < IDLE_S:
                return connection
            connection.abort()
        return None

    async def _opened(self) -> Connection:
        target, loop = self._target, asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, made = await loop.create_connection(Connection, target.host, target.port, ssl=self._tls)
        except TimeoutError:
            raise Fault("connect", f"no connection within {CONNECT_S:g} s") from None
        except ssl.SSLError as error:
            raise Fault("tls", f"no TLS connection: {error.reason or error}") from error
        except (OSError, UnicodeError) as error:
            raise Fault("connect", f"no connection: {error}") from error
        return made


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._reader: Reader | None = None
        self._done: asyncio.Future[None] | None = None
        self._fault: Fault | None = None
        self._keep = self._complete = False
        self.idle_since = 0.0

    async def ask(self, request: bytes, reader: Reader) -> None:
        """Send the bytes of a request; returns when the answer has ended. Raises Fault."""
        if self._transport is None:
            raise Fault("cut", "the connection was closed before the request was sent")
        self._done = asyncio.get_running_loop().create_future()
        self._parser, self._reader = httptools.HttpResponseParser(self), reader
        self._fault, self._keep, self._complete = None, False, False
        self._received, self._now = 0, 0.0
        self._in_head, self._framed, self._informal = True, False, False
        self._headers: dict[bytes, bytes] = {}
        self._transport.write(request)
        try:
            await self._done
        finally:
            self._reader = self._parser = self._done = None
            self.idle_since = time.perf_counter()
            if not self.usable:
                self.abort()

    @property
    def usable(self) -> bool:
        """Whether another request may be sent."""
        return self._keep and self._transport is not None and not self._transport.is_closing()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        parser = self._parser
        if parser is None or self._done is None or self._done.done():
            self._keep = False  # nothing was asked for
            return self.abort()
        self._received += len(data)
        try:
            parser.feed_data(data)
        except httptools.HttpParserError as error:
            return self._fail(self._fault or Fault("nonsense", f"no HTTP: {error}"))
        except httptools.HttpParserUpgrade:
            return self._fail(Fault("nonsense", "the connection is to speak another protocol than HTTP"))
        # looked at afterwards: what is behind the head in the same read is no part of it
        what, most = ("headers are", MAX_HEAD_BYTES) if self._in_head else ("answer is", MAX_BYTES)
        if self._fault is not None:
            self._fail(self._fault)
        elif self._complete:
            self._done.set_result(None)
        elif self._received > most:
            self._fail(Fault("too_large", f"the {what} larger than {most} bytes"))
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._done is None or self._done.done():
            return
        if exc is None and not self._in_head and not self._framed and self._reader is not None:
            try:
                self._reader.end(time.perf_counter())  # a body without a length ends with its connection
                return self._done.set_result(None)
            except Fault as fault:
                return self._fail(fault)
        detail = f": {exc}" if exc else ""
        return self._fail(Fault("cut", f"the connection was cut before the answer's end{detail}"))

    # What httptools calls. A fault waits until it returns, for it would wrap it in one of its own.

    def on_message_begin(self) -> None:
        if self._complete:
            self._keep = False  # more than was asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._parser is None or self._reader is None or self._complete:
            return
        status = self._parser.get_status_code()
        self._informal = 100 <= status < 200
        if self._informal:  # such as 103, early hints: the answer comes behind it
            return
        headers = self._headers
        self._framed = b"content-length" in headers or b"transfer-encoding" in headers
        self._in_head = False
        kind, encoding = (headers.get(name, b"").decode("latin-1") for name in (b"content-type", b"content-encoding"))
        try:
            self._reader.head(status, kind, encoding.strip().lower())
        except Fault as fault:
            self._fault = fault

    def on_body(self, body: bytes) -> None:
        if self._fault is None and self._reader is not None and not self._complete:
            try:
                self._reader.body(body, self._now)
            except Fault as fault:
                self._fault = fault

    def on_message_complete(self) -> None:
        if self._parser is None or self._reader is None or self._complete or self._fault is not None:
            return
        if self._informal:
            self._headers.clear()
            return
        self._complete, self._keep = True, self._parser.should_keep_alive()
        try:
            self._reader.end(self._now)
        except Fault as fault:
            self._fault = fault

    def _fail(self, fault: Fault) -> None:
        # an answer that has ended in order leaves the connection as good as any other
        self._keep = self._keep and self._complete
        if self._done is not None and not self._done.done():
            self._done.set_exception(fault)
        if not self._keep:
            self.abort()


def tls_context(target: Target) -> ssl.SSLContext:
    """Certificates are checked. Raises BenchError where those to trust cannot be read."""
    try:
        return ssl.create_default_context(cafile=target.ca_file)
    except OSError as error:  # ssl.SSLError is one
        raise BenchError(f"{target.ca_file}: no certificates: {error}", "give a PEM file with --ca-file") from error


def _head(target: Target, path: str) -> bytes:
    """The head of every request up to the number of its length."""
    host = f"[{target.host}]" if ":" in target.host else target.host
    rows = {
        "Host": f"{host}:{target.port}", "User-Agent": "truthgpt-bench", "Accept-Encoding": "identity",
        "Content-Type": "application/json",
    }  # fmt: skip
    rows["Accept"] = "text/event-stream" if target.streams else "application/json"
    if target.api_key is not None:
        rows["Authorization"] = f"Bearer {target.api_key}"
    if not target.allow_cache:
        rows["Cache-Control"] = "no-cache"
    given = {name.lower() for name, _ in target.headers}
    lines = [f"{name}: {value}" for name, value in rows.items() if name.lower() not in given]
    lines += [f"{name}: {value}" for name, value in target.headers]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "Content-Length: "]).encode("latin-1")
