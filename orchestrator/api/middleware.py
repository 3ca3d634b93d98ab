"""The front door, plain ASGI: request id, language, route, caller, and every error that nobody else answered."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import quote

from orchestrator.api import errors as table
from orchestrator.api.headers import language_of, request_id, traceparent_of
from orchestrator.api.http import Exchange, HangUp, Receive, Refused, Scope, Send
from orchestrator.api.routing import Router
from orchestrator.context import handling
from orchestrator.domain import Caller
from orchestrator.errors import InternalError, TruthGPTError
from orchestrator.incident import Incident

log = logging.getLogger(__name__)

Handler = Callable[[Exchange], Awaitable[None]]
Routes = Mapping[str, Mapping[str, Handler]]  # path template -> method -> handler; {name} takes any one segment
Identify = Callable[[dict[bytes, bytes], str], Caller]  # headers by lower-case name, the client's address

# Probes, the API's description, and on the ops port the figures: no credential is asked for.
OPEN = frozenset({
    "/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/openapi.json", "/metrics",
    "/summary",
})  # fmt: skip
NOBODY = "anonymous"
_NOBODIES = {language: Caller(NOBODY, language=language) for language in ("en", "es")}
MAX_HEADERS = 100
MAX_HEADER_BYTES = 64 << 10


class FrontDoor:
    """Routes a request to its handler, and finds out who asks. Whatever is raised is answered here, in the caller's
    language.

    `identify` raises TruthGPTError for a caller who may not come in; the paths in OPEN need none. `report` is told of
    every error of which the path has made no Record.
    """

    def __init__(
        self, routes: Routes, body_limit_bytes: int, identify: Identify,
        report: Callable[[Incident], None] = lambda incident: None,
    ) -> None:  # fmt: skip
        self.routes = routes
        self._router = Router(routes)
        self._body_limit_bytes = body_limit_bytes
        self._identify, self._report = identify, report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        accepted_at = time.monotonic()
        fields = scope["headers"]
        headers = dict(reversed(fields))  # the first of a repeated header counts
        exchange = Exchange(
            scope,
            receive,
            send,
            id=request_id(headers.get(b"x-request-id")),
            caller=_NOBODIES[language_of(headers.get(b"accept-language", b""))],
            accepted_at=accepted_at,
            headers=headers,
            body_limit_bytes=self._body_limit_bytes,
            traceparent=traceparent_of(headers.get(b"traceparent")),
        )
        handling.set((exchange.id, exchange.traceparent))  # in the request's own task, which ends with it
        try:
            if len(fields) > MAX_HEADERS or sum([len(name) + len(value) for name, value in fields]) > MAX_HEADER_BYTES:
                raise Refused(table.HEADERS_TOO_LARGE, table.TOO_MANY_HEADERS, ((b"connection", b"close"),))
            await self._handle(exchange, scope)
        except HangUp:
            log.debug("the client of %s hung up", exchange.id)
        except Refused as refused:
            self._tell(exchange, refused.row.code or "")
            await exchange.refuse(refused)
        except TruthGPTError as error:
            self._tell(exchange, error.kind)
            if isinstance(error, InternalError):
                log.error("request %s failed: %s", exchange.id, error, exc_info=error)
            await self._fail(exchange, error)
        except Exception as error:
            self._tell(exchange, InternalError.kind)
            log.exception("request %s failed", exchange.id)
            await self._fail(exchange, InternalError(type(error).__name__))

    async def _handle(self, exchange: Exchange, scope: Scope) -> None:
        found = self._router.find((scope.get("raw_path") or quote(exchange.path).encode()).decode("latin-1"))
        if found is None:
            raise Refused(table.NOT_FOUND, table.NO_SUCH_PATH)
        method, methods = scope["method"], found.target
        handler = methods.get("GET" if method == "HEAD" else method)
        if handler is None:
            allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])]).encode()
            raise Refused(table.METHOD_NOT_ALLOWED, table.WRONG_METHOD, ((b"allow", allowed),))
        exchange.template, exchange.params = found.template, found.params
        exchange.notes.route = f"{method} {found.template}"
        if found.template not in OPEN:
            caller, language = self._identify(exchange.headers, exchange.address), exchange.caller.language
            exchange.caller = caller if caller.language == language else dataclasses.replace(caller, language=language)
        await handler(exchange)

    def _tell(self, exchange: Exchange, kind: str) -> None:
        if exchange.notes.recorded:
            return
        incident = Incident(
            kind=kind,
            id=exchange.id,
            edge=exchange.notes.edge,
            operation=exchange.template,
            caller="" if exchange.caller.id == NOBODY else exchange.caller.id,
            address=exchange.address,
            at=time.time(),
            traceparent=exchange.traceparent,
        )
        try:
            self._report(incident)
        except Exception:  # whoever listens may not fail the request
            log.exception("an incident could not be reported")

    async def _fail(self, exchange: Exchange, error: TruthGPTError) -> None:
        if not exchange.started:
            await exchange.fail(error)
        # Otherwise the server closes the connection in the middle, which no client takes for a complete answer.
