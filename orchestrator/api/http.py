"""One HTTP exchange over plain ASGI: what the handlers read from and answer through."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from types import TracebackType
from typing import Any

import orjson

from orchestrator.api import errors as table
from orchestrator.api.bodies import CODINGS, decompress, json_object
from orchestrator.api.notes import note_headers
from orchestrator.domain import Caller, Notes
from orchestrator.errors import PayloadTooLarge, Text, TruthGPTError, Unauthenticated

ASGIMessage = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
# What to call, once, when the client has hung up or has not read its answer within so many seconds. None: not any more.
WhenGone = Callable[[Callable[[], None], float | None], None]
Headers = Sequence[tuple[bytes, bytes]]

JSON_TYPE = b"application/json"
SLOW_READER_S = 5.0  # what a client that does not read its answer gets beyond the request's own deadline


class HangUp(Exception):
    """The client is gone: there is nobody to answer."""


class Refused(Exception):
    """What the edge itself refuses, before any rule of the gateway's: a path, a method, a coding, too many headers."""

    def __init__(self, row: table.Row, text: Text, headers: Headers = ()) -> None:
        super().__init__(text.en)
        self.row, self.text, self.headers = row, text, headers


class HangUpWatch:
    """What `Exchange.cancelled_by_hang_up` returns."""

    __slots__ = ("_exchange", "_task", "_when_gone", "_within_s")

    def __init__(self, exchange: Exchange, when_gone: WhenGone, within_s: float) -> None:
        self._exchange, self._when_gone, self._within_s = exchange, when_gone, within_s

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("an exchange runs in a task")
        self._task = task
        self._when_gone(self._gone, self._within_s)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._when_gone(self._gone, None)
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            if self._exchange.gone and self._task.uncancel() == 0:
                raise HangUp from None

    def _gone(self) -> None:
        if not self._exchange.gone:
            self._exchange.gone = True
            self._task.cancel()


class Exchange:
    """A request and the way to answer it. `id` is echoed on every response; `accepted_at` is monotonic seconds."""

    __slots__ = (
        "_body_limit_bytes", "_extensions", "_receive", "_send", "accepted_at", "address", "caller", "gone", "headers",
        "id", "notes", "params", "path", "started", "template", "traceparent",
    )  # fmt: skip

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, *, id: str, caller: Caller, accepted_at: float,
        headers: dict[bytes, bytes], body_limit_bytes: int, traceparent: str | None,
    ) -> None:  # fmt: skip
        self.path: str = scope["path"]
        self.address: str = (scope.get("client") or ("",))[0]
        self.template = ""  # the route's, once it is found
        self.id, self.caller, self.accepted_at = id, caller, accepted_at
        self.headers, self.traceparent = headers, traceparent
        self.notes = Notes(edge="kserve" if self.path.startswith("/v2") else "openai")
        self.gone = False
        self.started = False
        self.params: dict[str, str] = {}
        self._receive, self._send = receive, send
        self._extensions = scope.get("extensions", {})
        self._body_limit_bytes = body_limit_bytes

    async def json(self) -> dict[str, Any]:
        """The body as a JSON object. Raises what `body()` raises, and InvalidRequest for what is none."""
        return json_object(await self.body())

    async def body(self) -> bytes:
        """The body, decompressed. It and what it was sent as are within the size limit.

        Raises PayloadTooLarge before reading it all, Refused for an unknown coding, InvalidRequest, or HangUp.
        """
        given = self.headers.get(b"content-encoding")
        if given is None:
            return await self._body()
        coding = given.strip().lower().decode("latin-1")
        coding = {"": "identity", "x-gzip": "gzip"}.get(coding, coding)
        if coding not in (*CODINGS, "identity"):
            raise Refused(table.UNSUPPORTED_CODING, table.CODINGS_TAKEN, ((b"accept-encoding", b"gzip, deflate"),))
        body = await self._body()
        return body if coding == "identity" or not body else decompress(body, coding, self._body_limit_bytes)

    async def _body(self) -> bytes:
        limit = self._body_limit_bytes
        declared = self.headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > limit:
            raise PayloadTooLarge(limit)
        body, more = await self._part()
        if len(body) > limit:
            raise PayloadTooLarge(limit)
        if not more:  # as nearly always
            return body
        whole = bytearray(body)
        while more:
            body, more = await self._part()
            whole += body
            if len(whole) > limit:
                raise PayloadTooLarge(limit)
        return bytes(whole)

    async def _part(self) -> tuple[bytes, bool]:
        """The next piece of the body, and whether there are more."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.gone = True
            raise HangUp
        return message.get("body", b""), message.get("more_body", False)

    def cancelled_by_hang_up(self, within_s: float) -> HangUpWatch:
        """Cancel the block as soon as the client hangs up, or does not read its answer for `within_s`; raises HangUp.

        To be entered once the body has been read.
        """
        # of our own server: a task that waits for `http.disconnect` would cost each request more than its routing
        when_gone: WhenGone = self._extensions["truthgpt.when_gone"]["call"]
        return HangUpWatch(self, when_gone, within_s)

    async def reply(self, status: int, body: bytes, content_type: bytes = JSON_TYPE, headers: Headers = ()) -> None:
        """The whole response at once."""
        await self._start(status, content_type, [(b"content-length", b"%d" % len(body)), *headers])
        await self._send({"type": "http.response.body", "body": body})

    async def reply_json(self, status: int, value: object, headers: Headers = ()) -> None:
        await self.reply(status, orjson.dumps(value), headers=headers)

    async def fail(self, error: TruthGPTError) -> None:
        """An error before the response has begun."""
        body = table.encode(table.body_of(error, self.caller.language), self.path)
        headers = table.headers_of(error)
        if isinstance(error, Unauthenticated):
            headers.append((b"www-authenticate", b"Bearer"))
        if isinstance(error, PayloadTooLarge):  # the rest of the body is not read: the connection cannot be used again
            headers.append((b"connection", b"close"))
        await self.reply(table.TABLE[type(error)].status, body, headers=headers)

    async def refuse(self, refused: Refused) -> None:
        """A refusal of the edge's own; what is left of the body is not read."""
        body = table.encode(table.openai_body(refused.row, refused.text, self.caller.language), self.path)
        await self.reply(refused.row.status, body, headers=refused.headers)

    async def begin_events(self) -> None:
        """Start a stream of server-sent events."""
        await self._start(
            200, b"text/event-stream; charset=utf-8", [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        )

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": data})

    async def _start(self, status: int, content_type: bytes, headers: Headers) -> None:
        self.started = True
        fields = [(b"content-type", content_type), (b"x-request-id", self.id.encode())]
        fields += note_headers(self.notes)
        fields += headers
        await self._send({"type": "http.response.start", "status": status, "headers": fields})
