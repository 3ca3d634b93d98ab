"""The front door of gRPC: each call's id, language, method and caller, and every error that nobody else answered."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from orchestrator.api.grpc_errors import NOT_A_MESSAGE, TABLE, details_of, metadata_of
from orchestrator.api.headers import language_of, request_id, traceparent_of
from orchestrator.api.middleware import NOBODY, Identify
from orchestrator.api.notes import note_headers
from orchestrator.context import handling
from orchestrator.domain import Caller, Notes
from orchestrator.errors import DeadlineExceeded, InternalError, InvalidRequest, TruthGPTError
from orchestrator.incident import Incident

log = logging.getLogger(__name__)

# What grpc raises where it cannot send a message: the call is over, and `context.cancelled()` says so only later.
GONE = grpc.aio.InternalError
NO_SUCH_METHOD = "not_found"  # as over HTTP, in what is reported
TOO_MANY_STREAMS = "too_many_streams"
OPEN_STREAMS = 100  # at a time in one process, of all that need no credential: strangers can hold them
MESSAGE_S = 30.0  # for such a stream's next message to come, and to be answered; for the one of a call without a key


class Rpc:
    """One call, or one of the requests of a stream. `accepted_at` is monotonic seconds; header names are lower-case."""

    def __init__(self, context: Any, method: str) -> None:
        self.accepted_at = time.monotonic()
        self.context = context
        # backwards: the first of a repeated name counts
        self.headers = {name.encode(): _bytes(value) for name, value in reversed(context.invocation_metadata())}
        self.id = request_id(self.headers.get(b"x-request-id"))
        self.traceparent = traceparent_of(self.headers.get(b"traceparent"))
        self.caller = Caller(NOBODY, language=language_of(self.headers.get(b"accept-language", b"")))
        self.notes = Notes(edge="grpc", route=method)
        self.told = False  # whether the error that ends the call was logged and reported
        self.address = self.peer  # until the door finds that a trusted proxy names the client's

    @property
    def within_s(self) -> float | None:
        """What is left of the client's own deadline: never 0, which elsewhere says that there is none."""
        left_s: float | None = self.context.time_remaining()
        return None if left_s is None else max(left_s, 1e-3)

    @property
    def peer(self) -> str:
        """The address at the other end: grpc's own text is a kind, it and a port, IPv6's brackets percent-encoded."""
        return unquote(self.context.peer().partition(":")[2]).rpartition(":")[0].strip("[]")

    def another(self, number: int) -> Rpc:
        """The same call's request of this number, from 0, accepted now."""
        other = copy.copy(self)
        other.accepted_at, other.notes = time.monotonic(), Notes(edge="grpc", route=self.notes.route)
        other.id = f"{self.id}-{number}" if number else self.id
        return other

    def end(self, *more: tuple[bytes, bytes]) -> tuple[tuple[str, str | bytes], ...]:
        """The trailing metadata: it can hold what is known only at the end, and travels with the answer for nothing."""
        noted = ((name.decode(), value) for name, value in (*note_headers(self.notes), *more))
        return (("x-request-id", self.id), *noted)


@dataclass(frozen=True)
class Unary:
    """A method that takes one message, of the class `request`, and gives one. `open`: without a credential."""

    request: Any
    handle: Callable[[Rpc, Any], Awaitable[Any]]
    open: bool = False


@dataclass(frozen=True)
class Stream:
    """A method that takes a stream of messages' bytes, and answers by writing to the call's context."""

    handle: Callable[[Door, Rpc, AsyncIterator[bytes]], Awaitable[None]]
    open: bool = False  # without a credential, and only OPEN_STREAMS of these at a time


Methods = Mapping[str, Unary | Stream]  # SERVICE/METHOD -> what answers it


class Door(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """`identify` raises TruthGPTError for a caller who may not come in. `report` is told of every error of which the
    path has made no Record. `trusted_proxies`, comma-separated addresses, may name a client's in x-forwarded-for.
    """

    def __init__(
        self, methods: Methods, identify: Identify, report: Callable[[Incident], None], trusted_proxies: str | None
    ) -> None:
        self.methods = methods
        self._identify, self._report = identify, report
        self._open_streams = 0
        self._proxies = ProxyHeadersMiddleware(_nobody, trusted_proxies) if trusted_proxies else None
        self._handlers = {f"/{name}": self._handler(name, method) for name, method in methods.items()}
        self._unknown = grpc.stream_stream_rpc_method_handler(self._refuse_unknown)

    def service(self, handler_call_details: Any) -> Any:
        """grpc's own question: who answers this method?"""
        return self._handlers.get(handler_call_details.method, self._unknown)

    async def admit(self, rpc: Rpc) -> None:
        """Find out who asks. Raises TruthGPTError."""
        caller = self._identify(rpc.headers, rpc.address)
        language = rpc.caller.language
        rpc.caller = caller if caller.language == language else dataclasses.replace(caller, language=language)

    async def _called(self, context: Any, name: str) -> Rpc:
        """The call that a handler's task answers."""
        rpc = Rpc(context, name)
        handling.set((rpc.id, rpc.traceparent))
        if self._proxies is not None:
            rpc.address = await _forwarded(self._proxies, rpc)
        return rpc

    def tell(self, rpc: Rpc, error: BaseException) -> TruthGPTError:
        """Log and report an error that ends a request; what of it the client may know."""
        known = error if isinstance(error, TruthGPTError) else InternalError(type(error).__name__)
        if rpc.told:
            return known
        if isinstance(known, InternalError):
            log.error("request %s failed: %s", rpc.id, known, exc_info=error)
        if not rpc.notes.recorded:
            self._incident(rpc, known.kind, rpc.notes.route)
        return known

    def _handler(self, name: str, method: Unary | Stream) -> Any:
        if isinstance(method, Stream):

            async def stream(messages: AsyncIterator[bytes], context: Any) -> None:
                rpc = await self._called(context, name)
                try:
                    if method.open:
                        await self._handle_open(method, rpc, messages)
                    else:
                        await self.admit(rpc)
                        await method.handle(self, rpc, messages)
                    context.set_trailing_metadata(rpc.end())
                except grpc.aio.AbortError:
                    raise  # the handler has ended the call by itself
                except GONE:
                    context.set_code(grpc.StatusCode.CANCELLED)
                    log.debug("the client of %s hung up", rpc.id)
                except Exception as error:
                    self._end(rpc, error)

            return grpc.stream_stream_rpc_method_handler(stream)

        async def unary(messages: AsyncIterator[bytes], context: Any) -> bytes:
            rpc = await self._called(context, name)
            try:
                if not method.open:
                    await self.admit(rpc)
                async with soon() if method.open else nullcontext():
                    raw = await context.read()
                if not isinstance(raw, bytes):  # grpc.aio.EOF
                    raise InvalidRequest(NOT_A_MESSAGE)
                answer: bytes = (await method.handle(rpc, parse(method.request, raw))).SerializeToString()
                context.set_trailing_metadata(rpc.end())
                return answer
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                self._end(rpc, error)
                return b""  # not sent: the status is not OK

        # grpc itself would wait for the message without end, and ask nobody for a key before it has come
        return grpc.stream_unary_rpc_method_handler(unary)

    async def _handle_open(self, method: Stream, rpc: Rpc, messages: AsyncIterator[bytes]) -> None:
        """A stream that anybody may hold: beyond so many of them the next one is refused."""
        if self._open_streams >= OPEN_STREAMS:
            self._incident(rpc, TOO_MANY_STREAMS, rpc.notes.route)
            rpc.context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
            rpc.context.set_details("Too many such streams are open.")
            return
        self._open_streams += 1
        try:
            await method.handle(self, rpc, messages)
        finally:
            self._open_streams -= 1

    def _end(self, rpc: Rpc, error: Exception) -> None:
        """Make an error the call's status. Not by `abort`: the context keeps what that raises, and so the request."""
        known = self.tell(rpc, error)
        rpc.context.set_code(TABLE[type(known)])
        rpc.context.set_details(details_of(known, rpc.caller.language))
        rpc.context.set_trailing_metadata(rpc.end(*metadata_of(known)))

    async def _refuse_unknown(self, messages: AsyncIterator[bytes], context: Any) -> None:
        rpc = await self._called(context, "")
        self._incident(rpc, NO_SUCH_METHOD, "")  # its name is the client's, of any length and kind
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "There is no such method here.", rpc.end())

    def _incident(self, rpc: Rpc, kind: str, operation: str) -> None:
        try:
            self._report(
                Incident(
                    kind=kind,
                    id=rpc.id,
                    edge="grpc",
                    operation=operation,
                    caller="" if rpc.caller.id == NOBODY else rpc.caller.id,
                    address=rpc.address,
                    at=time.time(),
                    traceparent=rpc.traceparent,
                )
            )
        except Exception:  # whoever listens may not fail the request
            log.exception("an incident could not be reported")


def parse(kind: Any, raw: bytes) -> Any:
    """A message of this class. Raises InvalidRequest."""
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidRequest(NOT_A_MESSAGE) from error


@asynccontextmanager
async def soon() -> AsyncGenerator[None, None]:
    """A step of a call that anybody may make. Raises DeadlineExceeded where it is not over in MESSAGE_S."""
    try:
        async with asyncio.timeout(MESSAGE_S):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded("no message came") from error


async def _forwarded(proxies: ProxyHeadersMiddleware, rpc: Rpc) -> str:
    """The client's address as a proxy names it, if it is a trusted one: by the same rule as over HTTP."""
    fields = [(name.encode(), _bytes(value)) for name, value in rpc.context.invocation_metadata()]
    scope: Any = {"type": "http", "client": (rpc.peer, 0), "headers": fields}
    await proxies(scope, _nothing, _nothing)
    return str(scope["client"][0])


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


async def _nobody(scope: Any, receive: Any, send: Any) -> None:
    """The application behind ProxyHeadersMiddleware: only what that makes of the address is wanted."""


async def _nothing(*_: Any) -> Any:
    return None
