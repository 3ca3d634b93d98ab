"""What goes over the wire to Triton and back: bodies, events, and the one translation of Triton's errors into ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from orchestrator.domain import FINISH_REASONS, Chunk, GenerateRequest
from orchestrator.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    Overloaded,
    Text,
    TruthGPTError,
    UpstreamError,
    UpstreamUnavailable,
)
from orchestrator.sse import EventParser
from orchestrator.triton.connection import Answer

_KIND = re.compile(
    r"\b(invalid_argument|resource_exhausted|out_of_memory|deadline_exceeded|unavailable|internal|cancelled): (.*)",
    re.DOTALL,
)
_UNKNOWN_MODEL = re.compile(r"unknown model|is not found|no such file|does not exist", re.IGNORECASE)
_AWAY = re.compile(r"not healthy|not ready|no available versions|unavailable|shutting down", re.IGNORECASE)
BODY_LIMIT_BYTES = 8 << 20


@dataclass(frozen=True)
class Reply:
    """Triton's answer as it came: status, lower-case headers, body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def sampling(request: GenerateRequest) -> dict[str, object]:
    """The part of `sampling_parameters` that holds the prompt, where it is no plain text."""
    if request.messages is not None:
        return {"messages": [{"role": turn.role, "content": turn.content} for turn in request.messages]}
    if request.token_ids is not None:
        return {"prompt_token_ids": list(request.token_ids)}
    return {}


def payload(request: GenerateRequest, max_tokens: int | None, timeout_s: float) -> dict[str, object]:
    """The body of `generate_stream`."""
    given: dict[str, object] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "timeout_s": timeout_s,
        **sampling(request),
    }
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    if request.seed is not None:
        given["seed"] = request.seed
    if request.stop:
        given["stop"] = list(request.stop)
    return {
        "id": request.id,
        "text_input": request.text or "",
        "stream": True,
        "sampling_parameters": orjson.dumps(given).decode(),
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }


def pieces(parser: EventParser, data: bytes) -> Iterator[Chunk]:
    """The chunks that these bytes complete. Raises on an in-band error, on nonsense and on an end without an answer."""
    if not data:
        raise UpstreamUnavailable("the stream ended before the answer did")
    try:
        events = parser.feed(data)
    except ValueError as error:
        raise UpstreamError(str(error)) from error
    return map(_chunk, events)


def _chunk(event: bytes) -> Chunk:
    fields = decode(event)
    if not isinstance(fields, dict) or "error" in fields:
        raise error_of(event, 200)
    try:
        given = fields.get
        reason = scalar(given("finish_reason", "")) or None
        if reason is not None and reason not in FINISH_REASONS:
            raise ValueError(f"finish_reason {reason!r}")
        tokens, prompt_tokens = scalar(given("num_output_tokens", 0)), scalar(given("num_input_tokens", 0))
        return Chunk(str(scalar(fields["text_output"])), int(tokens), int(prompt_tokens), reason)
    except (KeyError, TypeError, ValueError) as error:
        raise UpstreamError("a chunk of Triton's stream makes no sense") from error


def scalar(value: Any) -> Any:
    """Triton writes a tensor of one element as a scalar or as a list of one, by its declared shape."""
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"{len(value)} elements where one was expected")
        return value[0]
    return value


def decode(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except (ValueError, RecursionError):
        return None  # every caller treats it as an answer that makes no sense


async def read_body(answer: Answer, until: float) -> bytes:
    """The whole body. Raises as `Answer.read` does, and UpstreamError when it is too large."""
    body = await answer.read(until)
    while data := await answer.read(until):
        body += data
        if len(body) > BODY_LIMIT_BYTES:
            raise UpstreamError(f"Triton's answer is larger than {BODY_LIMIT_BYTES} bytes")
    return body


def error_of(body: bytes, status: int) -> TruthGPTError:
    """Our error for an error body of Triton's: our backend's kinds first, then Triton's own sentences."""
    events = EventParser(BODY_LIMIT_BYTES).feed(body) if body.startswith(b"data:") else []
    fields = decode(events[0] if events else body)
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
        case "out_of_memory":
            return OutOfMemory(text)
        case "deadline_exceeded":
            return DeadlineExceeded(text)
        case "unavailable":
            return UpstreamUnavailable(text)
        case "cancelled":
            return Cancelled(text)
    return UpstreamError(text)
