"""Inference on models that answer once, and what Triton tells of a model."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Protocol
from urllib.parse import quote

import orjson

from orchestrator.domain import InferRequest, InferResult
from orchestrator.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Text,
    TruthGPTError,
    UpstreamError,
    UpstreamUnavailable,
)
from orchestrator.tensors import pack, unpack
from orchestrator.triton.attendance import Attendance
from orchestrator.triton.wire import Reply, decode, error_of

_HEADER_LENGTH = "inference-header-content-length"
_REQUEST_ID = re.compile(r"^\[request id: [^\]]*\] ")
# The whole beginning is compared: what comes behind it may quote names that the client chose.
_GONE = re.compile(r"(?:in ensemble '[^']*', )?(?:Stub process '|Request for unknown model)")


class Fetch(Protocol):
    """One unary exchange with Triton: `Triton.fetch`."""

    async def __call__(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float,
        attendance: Attendance | None = None,
    ) -> Reply: ...  # fmt: skip


async def infer(
    fetch: Fetch, request: InferRequest, attendance: Attendance, request_s: float,
    errors: Callable[[bytes, int], TruthGPTError] | None = None,
) -> InferResult:  # fmt: skip
    """Tensors go and come in their binary form. What Triton finds wrong with the request keeps Triton's own text, but
    for a model whose error bodies `errors` reads, by status.

    Raises InvalidRequest, DeadlineExceeded, UpstreamUnavailable, UpstreamError, or what `attendance.fail()` was
    given. Triton 2.51 goes on with a request whose caller has hung up: its answer is dropped.
    """
    whole_s = min(request_s, request.timeout_s or request_s)
    left_s = whole_s - (time.monotonic() - request.accepted_at)
    if left_s <= 0:
        raise DeadlineExceeded
    head, body = _request(request)
    headers = {_HEADER_LENGTH: str(head), "content-type": "application/octet-stream"}
    if request.traceparent:
        headers["traceparent"] = request.traceparent
    try:
        reply = await fetch("POST", _path(request.model), body, headers, left_s, attendance)
    except UpstreamUnavailable as error:
        if isinstance(error.__cause__, TimeoutError):
            raise DeadlineExceeded from error
        raise
    if reply.status != 200:
        raise _error(reply) if errors is None else _gone_is_away(errors(reply.body, reply.status))
    return _result(request.model, reply)


async def describe(fetch: Fetch, model: str, version: str, what: str, timeout_s: float) -> Any:
    """Triton's JSON about a model: `what` is "" for its metadata, "config" or "stats"; no model: all of them.

    Raises ModelNotFound for a model or version that is not served, UpstreamUnavailable, UpstreamError.
    """
    parts = ["v2", "models", quote(model, safe="")] if model else ["v2", "models"]
    parts += [*(["versions", quote(version, safe="")] if version else []), *([what] if what else [])]
    reply = await fetch("GET", "/".join(parts), None, {}, timeout_s)
    if reply.status == 404:
        raise ModelNotFound(model)
    value = decode(reply.body)
    if reply.status != 200 or value is None:
        raise error_of(reply.body, reply.status)
    return value


@lru_cache(maxsize=1024)
def _path(model: str) -> str:
    return f"v2/models/{quote(model, safe='')}/infer"


def _request(request: InferRequest) -> tuple[int, bytes]:
    """Length of the JSON in front, and the whole body."""
    blobs = [pack(tensor) for tensor in request.inputs]
    head: dict[str, Any] = {
        "id": request.id,
        "parameters": dict(request.parameters),
        "inputs": [
            {"name": t.name, "datatype": t.datatype, "shape": t.shape, "parameters": {"binary_data_size": len(blob)}}
            for t, blob in zip(request.inputs, blobs, strict=True)
        ],
    }
    if request.outputs:
        head["outputs"] = [
            {"name": name, "parameters": {"binary_data": True, **({"classification": classes} if classes else {})}}
            for name, classes in request.outputs.items()
        ]
    else:
        head["parameters"]["binary_data_output"] = True
    try:
        encoded = orjson.dumps(head)
    except TypeError:  # a parameter that has more than 64 bits
        encoded = json.dumps(head).encode()
    return len(encoded), b"".join([encoded, *blobs])


def _result(model: str, reply: Reply) -> InferResult:
    length = reply.headers.get(_HEADER_LENGTH, str(len(reply.body)))
    fields = decode(reply.body[: int(length)]) if length.isdecimal() else None
    if isinstance(fields, dict) and "error" in fields:
        raise _error(reply)
    try:
        outputs, at = [], int(length)
        for row in fields["outputs"]:  # type: ignore[index]  # what is no dict is a TypeError, as below
            size = int(row["parameters"]["binary_data_size"])
            shape = tuple(int(one) for one in row["shape"])
            outputs.append(unpack(str(row["name"]), str(row["datatype"]), shape, reply.body[at : at + size]))
            at += size
        return InferResult(model, str(fields["model_version"]), tuple(outputs))  # type: ignore[index]
    except (KeyError, TypeError, ValueError, InvalidRequest) as error:
        raise UpstreamError(f"the answer of {model} makes no sense") from error


def _error(reply: Reply) -> TruthGPTError:
    fields = decode(reply.body)
    if reply.status == 400 and isinstance(fields, dict) and "error" in fields:
        text = _REQUEST_ID.sub("", str(fields["error"])).strip()
        if not _GONE.match(text):
            return InvalidRequest(Text(text, f"El modelo rechazó la petición: {text}"))
    return _gone_is_away(error_of(reply.body, reply.status))


def _gone_is_away(error: TruthGPTError) -> TruthGPTError:
    """A model that Triton does not know was served a moment ago: it is being reloaded or removed."""
    return UpstreamUnavailable(str(error)) if isinstance(error, ModelNotFound) else error
