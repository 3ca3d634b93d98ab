"""The front door, plain ASGI: request id, language, caller, route, and every error that nobody else answered."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping

from orchestrator.api import errors as table
from orchestrator.api.http import Exchange, HangUp, Receive, Scope, Send
from orchestrator.domain import Caller
from orchestrator.errors import InternalError, TruthGPTError

log = logging.getLogger(__name__)

Handler = Callable[[Exchange], Awaitable[None]]
Routes = Mapping[str, Mapping[str, Handler]]  # path -> method -> handler; a last segment {name} takes any one segment

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
# W3C Trace Context, version 00: an all-zero trace or parent id is invalid
_TRACEPARENT = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class FrontDoor:
    """Routes a request to its handler. Whatever a handler raises is answered here, in the caller's language."""

    def __init__(self, routes: Routes, body_limit_bytes: int) -> None:
        self._exact = {path: methods for path, methods in routes.items() if "{" not in path}
        self._open = {path.rpartition("/")[0]: methods for path, methods in routes.items() if path.endswith("}")}
        self._names = {path.rpartition("/")[0]: path.rpartition("/")[2][1:-1] for path in routes if path.endswith("}")}
        self._body_limit_bytes = body_limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        accepted_at = time.monotonic()
        headers = dict(reversed(scope["headers"]))  # the first of a repeated header counts
        exchange = Exchange(
            scope,
            receive,
            send,
            id=_request_id(headers.get(b"x-request-id")),
            caller=Caller("anonymous", language=_language(headers.get(b"accept-language", b""))),
            accepted_at=accepted_at,
            headers=headers,
            body_limit_bytes=self._body_limit_bytes,
            traceparent=_traceparent(headers.get(b"traceparent")),
        )
        try:
            await self._handle(exchange, scope["method"])
        except HangUp:
            log.debug("the client of %s hung up", exchange.id)
        except TruthGPTError as error:
            if isinstance(error, InternalError):
                log.error("request %s failed: %s", exchange.id, error, exc_info=error)
            await self._fail(exchange, error)
        except Exception as error:
            log.exception("request %s failed", exchange.id)
            await self._fail(exchange, InternalError(type(error).__name__))

    async def _handle(self, exchange: Exchange, method: str) -> None:
        methods = self._exact.get(exchange.path)
        if methods is None:
            folder, _, segment = exchange.path.rpartition("/")
            if segment and folder in self._open:
                methods = self._open[folder]
                exchange.params[self._names[folder]] = segment
        if methods is None:
            row, text, extra = table.Row(404, "invalid_request_error", "not_found"), table.NO_SUCH_PATH, []
        else:
            handler = methods.get("GET" if method == "HEAD" else method)
            if handler is not None:
                await handler(exchange)
                return
            allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])]).encode()
            row, text, extra = (
                table.Row(405, "invalid_request_error", "method_not_allowed"),
                table.WRONG_METHOD,
                [(b"allow", allowed)],
            )
        body = table.encode(table.openai_body(row, text, exchange.caller.language), exchange.path)
        await exchange.reply(row.status, body, headers=extra)

    async def _fail(self, exchange: Exchange, error: TruthGPTError) -> None:
        if not exchange.started:
            await exchange.fail(error)
        # Otherwise the server closes the connection in the middle, which no client takes for a complete answer.


def _request_id(given: bytes | None) -> str:
    return given.decode() if given and _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()


def _traceparent(given: bytes | None) -> str | None:
    return given.decode() if given and _TRACEPARENT.fullmatch(given) else None


def _language(accept: bytes) -> str:
    """en or es by Accept-Language (RFC 9110): highest weight, then order; English without either."""
    best, weight = "en", 0.0
    for item in accept.decode("latin-1").lower().split(",")[:20]:
        tag, *parameters = (part.strip() for part in item.split(";"))
        language = tag.partition("-")[0]
        if language not in ("en", "es"):
            continue
        q = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    q = float(parameter[2:])
                except ValueError:
                    q = 0.0
        if q > weight:
            best, weight = language, q
    return best
