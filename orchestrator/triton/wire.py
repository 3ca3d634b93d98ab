"""What goes over the wire to Triton and back: bodies, events, and the one translation of Triton's errors into ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
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
# Of Triton's own queue in front of a model with dynamic batching.
_QUEUE_FULL = re.compile(r"exceeds maximum queue size", re.IGNORECASE)
_QUEUE_LATE = re.compile(r"request timeout expired", re.IGNORECASE)
_AWAY = re.compile(r"not healthy|not ready|no available versions|unavailable|shutting down", re.IGNORECASE)
_PARAM = re.compile(
    r"(stop_token_ids|logit_bias|(?:max|min)_tokens|messages|prompt|stop|seed|(?:min|typical|top)_p|top_k|temperature"
    r"|(?:repetition|presence|frequency)_penalty|logprobs|n|ignore_eos|priority)(?:_token_ids)?\b"
)
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


def payload(
    request: GenerateRequest, max_tokens: int | None, timeout_s: float, tells_cached: bool = False
) -> dict[str, object]:  # fmt: skip
    """The body of `generate_stream`. `tells_cached`: the model has an output that says what its prefix cache had.

    All answers that are to be made are asked for, also where only the best of them are wanted: that way they can be
    counted, and a hang-up is seen, which Triton does not while nothing is streamed.
    """
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
    given.update(request.controls)
    if request.priority:
        given["priority"] = request.priority
    more: dict[str, object] = {"return_num_cached_tokens": True} if tells_cached else {}
    if not request.plain:
        if request.answers > 1:
            given["n"] = request.answers
        if tells_logprobs(request):
            given["logprobs"] = request.logprobs or 0
            more["return_logprobs"] = True
    return {
        "id": request.id,
        "text_input": request.text or "",
        "stream": True,
        "sampling_parameters": orjson.dumps(given).decode(),
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        **more,
    }


def tells_logprobs(request: GenerateRequest) -> bool:
    """Whether they are needed of the model: to be shown, or to find the best answers."""
    return request.logprobs is not None or request.best_of > 1


Read = Callable[[Mapping[str, Any]], Chunk]  # an event's fields; raises ValueError, TypeError and KeyError


def pieces(parser: EventParser, data: bytes, read: Read | None = None) -> Iterator[Chunk]:
    """The chunks that these bytes complete. Raises on an in-band error, on nonsense and on an end without an answer.

    `read` makes a chunk of an event of more than one plain answer.
    """
    if not data:
        raise UpstreamUnavailable("the stream ended before the answer did")
    try:
        events = parser.feed(data)
    except ValueError as error:
        raise UpstreamError(str(error)) from error
    return map(_chunk, events) if read is None else (_chunk(event, read) for event in events)


def _chunk(event: bytes, read: Read | None = None) -> Chunk:
    fields = decode(event)
    if not isinstance(fields, dict) or "error" in fields:
        raise error_of(event, 200)
    try:
        given = fields.get
        if read is not None:
            chunk = read(fields)
            chunk.prompt_tokens = int(scalar(given("num_input_tokens", 0)))
            chunk.version = str(given("model_version", ""))
            if (cached := given("num_cached_tokens")) is not None:
                chunk.cached_tokens = int(scalar(cached))
            return chunk
        reason = scalar(given("finish_reason", "")) or None
        if reason is not None and reason not in FINISH_REASONS:
            raise ValueError(f"finish_reason {reason!r}")
        tokens, prompt_tokens = scalar(given("num_output_tokens", 0)), scalar(given("num_input_tokens", 0))
        version = str(given("model_version", ""))
        chunk = Chunk(str(scalar(fields["text_output"])), int(tokens), int(prompt_tokens), reason, version=version)
        if "num_cached_tokens" in fields:
            chunk.cached_tokens = int(scalar(fields["num_cached_tokens"]))
        return chunk
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
    if _QUEUE_FULL.search(message):
        return Overloaded(message)
    if _QUEUE_LATE.search(message):
        return DeadlineExceeded(message)
    if _AWAY.search(message) or status == 503:
        return UpstreamUnavailable(message)
    if _UNKNOWN_MODEL.search(message) or status == 404:
        return ModelNotFound(message)
    return UpstreamError(message)


def _of_kind(kind: str, text: str) -> TruthGPTError:
    match kind:
        case "invalid_argument":
            # Our backend starts with the parameter's name, which is what OpenAI clients look for.
            name = _PARAM.match(text)
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
