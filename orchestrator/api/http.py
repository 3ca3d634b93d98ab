"""One HTTP exchange over plain ASGI: what the handlers read from and answer through."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from orchestrator.api import errors as table
from orchestrator.api.notes import note_headers
from orchestrator.domain import Caller, Notes
from orchestrator.errors import InvalidRequest, PayloadTooLarge, Text, TruthGPTError

ASGIMessage = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

MAX_DEPTH = 64
JSON_TYPE = b"application/json"


class HangUp(Exception):
    """The client is gone: there is nobody to answer."""


class Exchange:
    """A request and the way to answer it. `id` is echoed on every response; `accepted_at` is monotonic seconds."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, *, id: str, caller: Caller, accepted_at: float,
        headers: dict[bytes, bytes], body_limit_bytes: int, traceparent: str | None,
    ) -> None:  # fmt: skip
        self.path: str = scope["path"]
        self.id, self.caller, self.accepted_at = id, caller, accepted_at
        self.headers, self.traceparent = headers, traceparent
        self.notes = Notes()
        self.gone = False
        self.started = False
        self.params: dict[str, str] = {}
        self._receive, self._send = receive, send
        self._body_limit_bytes = body_limit_bytes

    async def json(self) -> dict[str, Any]:
        """The body as a JSON object. Raises PayloadTooLarge before reading it all, InvalidRequest, or HangUp."""
        body = await self._body()
        try:
            value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
            if b"\\u" in body:
                # A lone surrogate is legal in JSON's grammar and is no text: it could not be written out as UTF-8.
                json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeError as error:
            raise InvalidRequest(
                Text("The body is not valid UTF-8 text.", "El cuerpo no es texto UTF-8 válido.")
            ) from error
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(Text("The body is not valid JSON.", "El cuerpo no es JSON válido.")) from error
        if not isinstance(value, dict):
            raise InvalidRequest(Text("The body must be a JSON object.", "El cuerpo debe ser un objeto JSON."))
        if _deeper_than(value, MAX_DEPTH):
            raise InvalidRequest(
                Text(
                    f"The body is nested more than {MAX_DEPTH} levels deep.",
                    f"El cuerpo tiene más de {MAX_DEPTH} niveles de anidamiento.",
                )
            )
        return value

    async def _body(self) -> bytes:
        declared = self.headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > self._body_limit_bytes:
            raise PayloadTooLarge(self._body_limit_bytes)
        parts, size, more = [], 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone = True
                raise HangUp
            part = message.get("body", b"")
            size += len(part)
            if size > self._body_limit_bytes:
                raise PayloadTooLarge(self._body_limit_bytes)
            parts.append(part)
            more = message.get("more_body", False)
        return b"".join(parts)

    @contextlib.asynccontextmanager
    async def cancelled_by_hang_up(self, within_s: float) -> AsyncIterator[None]:
        """Cancel the block as soon as the client hangs up, or does not read its answer for `within_s`; raises HangUp.

        To be entered once the body has been read.
        """
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("an exchange runs in a task")
        watcher = asyncio.create_task(self._cancel_on_hang_up(task, within_s))
        try:
            yield
        except asyncio.CancelledError:
            if self.gone and task.uncancel() == 0:
                raise HangUp from None
            raise
        finally:
            watcher.cancel()

    async def _cancel_on_hang_up(self, task: asyncio.Task[Any], within_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while (await self._receive())["type"] != "http.disconnect":
                    continue
        self.gone = True
        task.cancel()

    async def reply(self, status: int, body: bytes, content_type: bytes = JSON_TYPE, headers: Headers = ()) -> None:
        """The whole response at once."""
        await self._start(status, content_type, [(b"content-length", b"%d" % len(body)), *headers])
        await self._send({"type": "http.response.body", "body": body})

    async def reply_json(self, status: int, value: object, headers: Headers = ()) -> None:
        await self.reply(status, json.dumps(value, ensure_ascii=False).encode(), headers=headers)

    async def fail(self, error: TruthGPTError) -> None:
        """An error before the response has begun."""
        body = table.encode(table.body_of(error, self.caller.language), self.path)
        headers = table.headers_of(error)
        if isinstance(error, PayloadTooLarge):  # the rest of the body is not read: the connection cannot be used again
            headers.append((b"connection", b"close"))
        await self.reply(table.TABLE[type(error)].status, body, headers=headers)

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
        fixed = [(b"content-type", content_type), (b"x-request-id", self.id.encode())]
        noted = note_headers(self.notes)
        await self._send({"type": "http.response.start", "status": status, "headers": [*fixed, *noted, *headers]})


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _deeper_than(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent if isinstance(parent, list) else ())
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True
