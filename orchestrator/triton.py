"""The only module that talks to Triton (HTTP/1.1, KServe v2 and its `generate` extension).

HTTP costs the gateway a third of what gRPC does for a stream, and a hang-up reaches the backend as fast, because our
backend writes at least every 250 ms. Triton's errors are translated here, once: nobody else sees an aiohttp exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp

from orchestrator.domain import Chunk, GenerateRequest
from orchestrator.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Text,
    TruthGPTError,
    UpstreamError,
    UpstreamUnavailable,
)
from orchestrator.sse import EventParser

_KIND = re.compile(
    r"\b(invalid_argument|resource_exhausted|deadline_exceeded|unavailable|internal|cancelled): (.*)", re.DOTALL
)
_UNKNOWN_MODEL = re.compile(r"unknown model|is not found|no such file|does not exist", re.IGNORECASE)
_AWAY = re.compile(r"not healthy|not ready|no available versions|unavailable|shutting down", re.IGNORECASE)
_BODY_LIMIT_BYTES = 8 << 20
_T = TypeVar("_T")


@dataclass(frozen=True)
class Deadlines:
    """Seconds. `stall_s`: a silent stream is dead; the others bound the first token and the whole answer."""

    stall_s: float = 1.5
    first_token_s: float = 120.0
    request_s: float = 600.0
    heartbeat_s: float = 1.0


@dataclass(frozen=True)
class Heartbeat:
    """What the stub process says of itself. `step_age_s`: age of the engine's step in progress, seconds."""

    running: int
    waiting: int
    slots: int
    step_age_s: float
    busy: bool


@dataclass(frozen=True)
class ModelConfig:
    """What the gateway needs of a model's config.pbtxt. `max_len` counts tokens; None when the entry does not say."""

    task: str
    chat: bool
    max_len: int | None


class Attendance:
    """One stream's tie to its model: `fail()` ends the stream at once, wherever it waits, with the given error."""

    def __init__(self) -> None:
        self.error: TruthGPTError | None = None
        self.heard_at = 0.0  # loop time of the last bytes: a stream that is being written to proves the stub alive
        self._timer: asyncio.Timeout | None = None

    def fail(self, error: TruthGPTError) -> None:
        self.error = self.error or error
        if self._timer is not None and not self._timer.expired():
            self._timer.reschedule(asyncio.get_running_loop().time())

    async def wait(self, call: Callable[[], Awaitable[_T]], until: float) -> _T:
        """Await `call()` until a loop time. Raises TimeoutError then, or at once what `fail()` is given."""
        self._raise()
        try:
            async with asyncio.timeout_at(until) as self._timer:
                result = await call()
        except TimeoutError:
            self._raise()
            raise
        finally:
            self._timer = None
        self.heard_at = asyncio.get_running_loop().time()
        return result

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error


class Triton:
    """One Triton server. Must be made inside a running event loop; `close()` it when done."""

    def __init__(self, url: str, deadlines: Deadlines, default_max_tokens: int | None = None) -> None:
        self.url = url.rstrip("/")
        self._deadlines = deadlines
        self._default_max_tokens = default_max_tokens
        # No limit of its own: admission bounds the streams, and a heartbeat must never wait for a connection.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0),
            timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def close(self) -> None:
        await self._session.close()

    async def stream(self, request: GenerateRequest, attendance: Attendance) -> AsyncGenerator[Chunk, None]:
        """The answer, chunk by chunk; the last one has a finish reason. Closing the iterator cancels it in the backend.

        Raises InvalidRequest, Overloaded, DeadlineExceeded, UpstreamUnavailable, UpstreamError, Cancelled, or what
        `attendance.fail()` was given.
        """
        now = asyncio.get_running_loop().time
        # from acceptance: a prompt that waited for its turn behind others of its request does not get it anew
        total_at = now() + self._deadlines.request_s - (time.monotonic() - request.accepted_at)
        deadline = min(total_at, now() + self._deadlines.first_token_s)
        wanted = request.max_tokens or self._default_max_tokens
        response = await self._open(request, wanted, attendance, deadline)
        try:
            parser, tokens, prompt_tokens, finished = EventParser(), 0, 0, False
            while not finished:
                for piece in _pieces(parser, await self._read(response, attendance, deadline)):
                    tokens += piece.tokens
                    prompt_tokens = prompt_tokens or piece.prompt_tokens
                    finished = piece.finish_reason is not None
                    if piece.text or finished:  # what has neither only keeps the connection alive
                        yield Chunk(piece.text, tokens, prompt_tokens, piece.finish_reason)
                        tokens, deadline = 0, total_at
                    if finished:
                        break
            # The answer is complete: only the connection's reuse depends on reading the stream to its end.
            with contextlib.suppress(TruthGPTError):
                while await self._read(response, attendance, deadline):
                    continue
        finally:
            # A response read to its end has given its connection back; any other one is hung up on.
            response.close()

    async def _open(
        self, request: GenerateRequest, max_tokens: int | None, attendance: Attendance, deadline: float
    ) -> aiohttp.ClientResponse:
        body = json.dumps(_payload(request, max_tokens, self._deadlines.request_s)).encode()
        headers = {"content-type": "application/json"}
        if request.traceparent:
            headers["traceparent"] = request.traceparent
        url = self._model_url(request.model, "generate_stream")
        response = await self._within(lambda: self._session.post(url, data=body, headers=headers), attendance, deadline)
        try:
            if response.status == 200 and response.content_type == "text/event-stream":
                return response
            # An early failure is a plain body, even with status 200, or one event with status 400: the body decides.
            text = await self._within(lambda: _read_body(response), attendance, deadline)
        except BaseException:
            response.close()
            raise
        error = _error_of(text, response.status)
        if isinstance(error, ModelNotFound):  # it was served a moment ago: it is being reloaded or removed
            raise UpstreamUnavailable(str(error)) from error
        if max_tokens and request.max_tokens is None and error.param == "max_tokens":
            # The gateway's default is more than the prompt leaves room for: the model's own default is all the room.
            return await self._open(request, None, attendance, deadline)
        raise error

    async def _read(self, response: aiohttp.ClientResponse, attendance: Attendance, deadline: float) -> bytes:
        return await self._within(response.content.readany, attendance, deadline)

    async def _within(self, call: Callable[[], Awaitable[_T]], attendance: Attendance, deadline: float) -> _T:
        """Await something of Triton's until it stalls or the request's deadline passes; translate what goes wrong."""
        now = asyncio.get_running_loop().time
        try:
            if now() >= deadline:
                raise DeadlineExceeded
            return await attendance.wait(call, min(now() + self._deadlines.stall_s, deadline))
        except TimeoutError as error:
            if now() >= deadline:
                raise DeadlineExceeded from error
            raise UpstreamUnavailable(f"Triton sent nothing for {self._deadlines.stall_s} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamUnavailable(f"the connection to Triton failed: {error!r}") from error

    async def heartbeat(self, model: str) -> Heartbeat:
        """Ask a model's stub process how it is. Raises TruthGPTError when it does not answer properly in time."""
        answer = await self._call(
            "POST", self._model_url(model, "generate"), {"text_input": "", "parameters": {"heartbeat": True}}
        )
        try:
            beat = json.loads(_scalar(answer["text_output"]))
            return Heartbeat(
                running=int(beat["running"]),
                waiting=int(beat["waiting"]),
                slots=int(beat["slots"]),
                step_age_s=float(beat["step_age_s"]),
                busy=bool(beat["busy"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UpstreamError(f"the heartbeat of {model} makes no sense") from error

    async def index(self) -> dict[str, tuple[str, str]]:
        """Model name -> (newest version, state); state is READY, LOADING, UNLOADING, UNAVAILABLE or empty."""
        rows = await self._call("POST", f"{self.url}/v2/repository/index", {})
        try:
            models: dict[str, tuple[str, str]] = {}
            for row in rows:
                version, state = str(row.get("version", "")), str(row.get("state", ""))
                known = models.get(row["name"])
                # One row a version. A version that is ready beats an older one that was unloaded.
                if known is None or (state == "READY", _version(version)) > (known[1] == "READY", _version(known[0])):
                    models[row["name"]] = (version, state)
            return models
        except (KeyError, TypeError, AttributeError) as error:
            raise UpstreamError("the repository index makes no sense") from error

    async def model_config(self, model: str) -> ModelConfig:
        """The parameters in a model's config.pbtxt."""
        answer = await self._call("GET", self._model_url(model, "config"), None)
        try:
            values = {name: str(value["string_value"]) for name, value in answer.get("parameters", {}).items()}
            length = values.get("max_len", "")
            return ModelConfig(
                values.get("task", "text_generation"), values.get("chat") == "true", int(length) if length else None
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UpstreamError(f"the configuration of {model} makes no sense") from error

    async def load(self, model: str, timeout_s: float) -> None:
        """Load or reload a model. Raises UpstreamError with Triton's reason when it does not load."""
        await self._call("POST", f"{self.url}/v2/repository/models/{quote(model, safe='')}/load", {}, timeout_s)

    async def unload(self, model: str, timeout_s: float) -> None:
        """Unload a model; Triton returns before its running requests have ended."""
        await self._call("POST", f"{self.url}/v2/repository/models/{quote(model, safe='')}/unload", {}, timeout_s)

    def _model_url(self, model: str, what: str) -> str:
        return f"{self.url}/v2/models/{quote(model, safe='')}/{what}"

    async def _call(self, method: str, url: str, body: object, timeout_s: float | None = None) -> Any:
        """One unary call: the decoded JSON of its answer, an empty object for an empty one."""
        data = None if body is None else json.dumps(body).encode()
        limit_s = timeout_s or self._deadlines.heartbeat_s
        try:
            async with asyncio.timeout(limit_s), self._session.request(method, url, data=data) as response:
                text = await _read_body(response)
        except TimeoutError as error:
            raise UpstreamUnavailable(f"Triton did not answer {url} within {limit_s} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamUnavailable(f"the connection to Triton failed: {error!r}") from error
        answer = _json(text) if text else {}
        if response.status != 200 or (isinstance(answer, dict) and "error" in answer):
            raise _error_of(text, response.status)
        return answer


def _payload(request: GenerateRequest, max_tokens: int | None, timeout_s: float) -> dict[str, object]:
    sampling: dict[str, object] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "timeout_s": timeout_s,
    }
    if max_tokens is not None:
        sampling["max_tokens"] = max_tokens
    if request.seed is not None:
        sampling["seed"] = request.seed
    if request.stop:
        sampling["stop"] = list(request.stop)
    if request.messages is not None:
        sampling["messages"] = [{"role": turn.role, "content": turn.content} for turn in request.messages]
    if request.token_ids is not None:
        sampling["prompt_token_ids"] = list(request.token_ids)
    return {
        "id": request.id,
        "text_input": request.text or "",
        "stream": True,
        "sampling_parameters": json.dumps(sampling),
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }


def _pieces(parser: EventParser, data: bytes) -> Iterator[Chunk]:
    """The chunks that these bytes complete. Raises on an in-band error, on nonsense and on an end without an answer."""
    if not data:
        raise UpstreamUnavailable("the stream ended before the answer did")
    try:
        events = parser.feed(data)
    except ValueError as error:
        raise UpstreamError(str(error)) from error
    for event in events:
        fields = _json(event)
        if not isinstance(fields, dict) or "error" in fields:
            raise _error_of(event, 200)
        try:
            reason = _scalar(fields.get("finish_reason", "")) or None
            if reason not in (None, "stop", "length"):
                raise ValueError(f"finish_reason {reason!r}")
            yield Chunk(
                text=str(_scalar(fields["text_output"])),
                tokens=int(_scalar(fields.get("num_output_tokens", 0))),
                prompt_tokens=int(_scalar(fields.get("num_input_tokens", 0))),
                finish_reason=reason,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UpstreamError("a chunk of Triton's stream makes no sense") from error


def _scalar(value: Any) -> Any:
    """Triton writes a tensor of one element as a scalar or as a list of one, by its declared shape."""
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"{len(value)} elements where one was expected")
        return value[0]
    return value


def _version(text: str) -> int:
    return int(text) if text.isdecimal() else -1


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None  # every caller treats it as an answer that makes no sense


async def _read_body(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    while data := await response.content.readany():
        body += data
        if len(body) > _BODY_LIMIT_BYTES:
            response.close()
            raise UpstreamError(f"Triton's answer is larger than {_BODY_LIMIT_BYTES} bytes")
    return bytes(body)


def _error_of(body: bytes, status: int) -> TruthGPTError:
    """Our error for an error body of Triton's: our backend's kinds first, then Triton's own sentences."""
    events = EventParser(_BODY_LIMIT_BYTES).feed(body) if body.startswith(b"data:") else []
    fields = _json(events[0] if events else body)
    if not isinstance(fields, dict) or "error" not in fields:
        return UpstreamError(f"Triton answered with status {status} and no error of its own")
    message = str(fields["error"])
    if match := _KIND.search(message):
        return _of_kind(match[1], match[2].strip())
    if _AWAY.search(message) or status == 503:
        return UpstreamUnavailable(message)
    if _UNKNOWN_MODEL.search(message) or status == 404:
        return ModelNotFound(message)
    return UpstreamError(message)


def _of_kind(kind: str, text: str) -> TruthGPTError:
    match kind:
        case "invalid_argument":
            # Our backend starts with the parameter's name, which is what OpenAI clients look for.
            name = re.match(r"(max_tokens|messages|prompt|stop|seed|top_k|top_p|temperature)(?:_token_ids)?\b", text)
            return InvalidRequest(Text(text, f"El modelo rechazó la petición: {text}"), name[1] if name else None)
        case "resource_exhausted":
            return Overloaded(text)
        case "deadline_exceeded":
            return DeadlineExceeded(text)
        case "unavailable":
            return UpstreamUnavailable(text)
        case "cancelled":
            return Cancelled(text)
    return UpstreamError(text)
