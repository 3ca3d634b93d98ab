"""One request of a connection and its answer: what an ASGI application receives and sends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Protocol

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

log = logging.getLogger(__name__)

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_VISIBLE = bytes(byte for byte in range(256) if byte == 0x09 or (byte >= 0x20 and byte != 0x7F))  # RFC 9110, 5.5
_FAILED = b"Internal Server Error"
_FAILED_HEADERS = (
    (b"content-type", b"text/plain; charset=utf-8"),
    (b"content-length", b"%d" % len(_FAILED)),
    (b"connection", b"close"),
)


class Turn:
    """Whose pieces of a stream wait for the turn of the event loop to end: what came together leaves in one write."""

    def __init__(self) -> None:
        self._cycles: list[Cycle] = []

    def hold(self, cycle: Cycle) -> None:
        """Flush it when the turn ends."""
        if not self._cycles:
            asyncio.get_running_loop().call_soon(self._end)
        self._cycles.append(cycle)

    def _end(self) -> None:
        cycles, self._cycles = self._cycles, []
        for cycle in cycles:
            cycle.flush()


class Connection(Protocol):
    """What a request needs of the connection that it came by."""

    transport: asyncio.Transport
    flow: FlowControl
    server_state: ServerState
    turn: Turn

    def close(self, unread: bool) -> None: ...
    def answered(self, cycle: Cycle) -> None: ...
    def ended(self, cycle: Cycle) -> None: ...


class Cycle:
    """`started`: something of the answer is written; `complete`: all of it; `disconnected`: nobody reads it."""

    __slots__ = (
        "_body", "_chunked", "_connection", "_expects", "_head", "_head_only", "_held", "_more_body", "_news",
        "_remaining", "_waiter", "complete", "disconnected", "keep_alive", "scope", "started",
    )  # fmt: skip

    def __init__(self, connection: Connection, scope: dict[str, Any], keep_alive: bool, expects_continue: bool) -> None:
        self._connection, self.scope, self.keep_alive = connection, scope, keep_alive
        self._expects = expects_continue
        self._body: bytes | bytearray = b""  # what has come and was not received yet
        self._more_body, self._news = True, False
        self._waiter: asyncio.Future[None] | None = None
        self._head: bytes | None = None  # goes out with the first of the body, in one packet
        self._held: list[bytes] = []  # pieces of a stream
        self._head_only = scope["method"] == "HEAD"
        self._chunked, self._remaining = False, 0
        self.started = self.complete = self.disconnected = False

    async def run(self, app: Callable[..., Any]) -> None:
        """Have the application answer. What it leaves unanswered gets a 500, what it leaves half said is cut off."""
        try:
            try:
                await app(self.scope, self._receive, self._send)
                if self.complete or self.disconnected:
                    return
                log.error("the application ended without a whole answer")
            except (Exception, asyncio.CancelledError) as error:
                log.error("the application failed", exc_info=error)
            if self.complete or self.disconnected:
                return
            if self.started:
                self.flush()
                self._connection.transport.close()
            else:
                self._head = None
                await self._send({"type": "http.response.start", "status": 500, "headers": _FAILED_HEADERS})
                await self._send({"type": "http.response.body", "body": _FAILED})
        finally:
            self._connection.ended(self)

    def feed(self, body: bytes) -> None:
        """A piece of the body has come."""
        if not self._body:
            self._body = body
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += body
        if len(self._body) > HIGH_WATER_LIMIT:
            self._connection.flow.pause_reading()
        self._wake()

    def feed_end(self) -> None:
        """The body has come to its end."""
        self._more_body = False
        self._wake()

    def disconnect(self) -> None:
        """The client is gone, or was answered by somebody else."""
        self.disconnected = True
        self._wake()

    def _wake(self) -> None:
        self._news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _receive(self) -> dict[str, Any]:
        if self._expects:
            self._expects = False
            self._write(_CONTINUE)
        if not (self.disconnected or self.complete):
            self._connection.flow.resume_reading()
            while not self._news:
                if self._waiter is None or self._waiter.done():
                    self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            self._news = False
        if self.disconnected or self.complete:
            return {"type": "http.disconnect"}
        body, self._body = self._body, b""
        return {"type": "http.request", "body": bytes(body), "more_body": self._more_body}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        flow = self._connection.flow
        if flow.write_paused and not self.disconnected:
            await flow.drain()
        if self.disconnected:
            return
        kind = message["type"]
        if self.complete:
            raise RuntimeError(f"{kind} after the whole answer")
        if not self.started and self._head is None:
            if kind != "http.response.start":
                raise RuntimeError(f"{kind} before http.response.start")
            self._expects = False
            self._head = self._render(message["status"], message.get("headers", ()))
            return
        if kind != "http.response.body":
            raise RuntimeError(f"{kind} inside of an answer")
        more = message.get("more_body", False)
        data = self._frame(message.get("body", b""), more)
        if self._head is not None:
            data, self._head, self.started = self._head + data, None, True
        if more:
            if data:
                if not self._held:
                    self._connection.turn.hold(self)
                self._held.append(data)
        else:
            if self._held:
                self._held.append(data)
                self.flush()
            else:
                self._write(data)
            self.complete = True
            self._wake()
            if not self.keep_alive:
                self._connection.close(unread=self._more_body)
            self._connection.answered(self)

    def flush(self) -> None:
        """Write what is held."""
        if self._held:
            held, self._held = self._held, []
            self._write(held[0] if len(held) == 1 else b"".join(held))

    def _write(self, data: bytes) -> None:
        transport = self._connection.transport
        if data and not transport.is_closing():
            transport.write(data)

    def _render(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        lines = [*self._connection.server_state.default_headers, *headers]
        framed = closes = False
        for name, value in headers:
            if name == b"content-length":
                framed, self._remaining = True, int(value)
            elif name == b"connection" and b"close" in value.lower():
                self.keep_alive, closes = False, True
        if not self.keep_alive and not closes:
            lines.append((b"connection", b"close"))
        self._chunked = not framed and not self._head_only and status not in (204, 304)
        if self._chunked:
            lines.append((b"transfer-encoding", b"chunked"))
        head = STATUS_LINE[status] + b"\r\n".join((*map(b": ".join, lines), b"", b""))
        # All that is not visible in a head are its ends of lines: a value that had one would be a header of its own.
        if head.translate(None, _VISIBLE) != b"\r\n" * (len(lines) + 2):
            raise RuntimeError("a header has a character that none may have")
        return head

    def _frame(self, body: bytes, more: bool) -> bytes:
        if self._head_only:
            return b""
        if self._chunked:
            if not more:
                return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
            return b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        self._remaining -= len(body)
        if self._remaining < 0 or (self._remaining and not more):
            raise RuntimeError("the body is not as long as its content-length says")
        return body
