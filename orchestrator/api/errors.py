"""The HTTP edge's error table, one row for every class of the tree, and the bodies OpenAI and KServe clients read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator import errors
from orchestrator.errors import Text, TruthGPTError


@dataclass(frozen=True)
class Row:
    """HTTP status, and OpenAI's `type` and `code`."""

    status: int
    type: str
    code: str | None = None


TABLE: Mapping[type[TruthGPTError], Row] = {
    errors.InvalidRequest: Row(400, "invalid_request_error"),
    errors.PayloadTooLarge: Row(413, "invalid_request_error", "payload_too_large"),
    errors.UnsafeInput: Row(400, "invalid_request_error", "unsafe_input"),
    errors.Unauthenticated: Row(401, "authentication_error", "invalid_api_key"),
    errors.PermissionDenied: Row(403, "permission_error", "permission_denied"),
    errors.RateLimited: Row(429, "rate_limit_error", "rate_limit_exceeded"),
    errors.ModelNotFound: Row(404, "invalid_request_error", "model_not_found"),
    errors.Overloaded: Row(503, "service_unavailable_error", "queue_full"),
    errors.OutOfMemory: Row(503, "service_unavailable_error", "out_of_memory"),
    errors.Unavailable: Row(503, "service_unavailable_error", "unavailable"),
    errors.GatewayFull: Row(503, "service_unavailable_error", "gateway_full"),
    errors.Draining: Row(503, "service_unavailable_error", "draining"),
    errors.KeysUnavailable: Row(503, "service_unavailable_error", "keys_unavailable"),
    errors.LimitsUnavailable: Row(503, "service_unavailable_error", "limits_unavailable"),
    errors.BreakerOpen: Row(503, "service_unavailable_error", "breaker_open"),
    errors.UpstreamUnavailable: Row(503, "service_unavailable_error", "model_unavailable"),
    errors.DeadlineExceeded: Row(504, "timeout_error", "deadline_exceeded"),
    errors.Cancelled: Row(499, "cancelled_error", "cancelled"),
    errors.InternalError: Row(500, "server_error", "internal_error"),
    errors.UpstreamError: Row(500, "server_error", "upstream_error"),
    errors.EmptyAnswer: Row(500, "server_error", "empty_answer"),
    TruthGPTError: Row(500, "server_error", "internal_error"),
}

# What the edge refuses by itself, before any rule of the gateway's.
NOT_FOUND = Row(404, "invalid_request_error", "not_found")
METHOD_NOT_ALLOWED = Row(405, "invalid_request_error", "method_not_allowed")
UNSUPPORTED_CODING = Row(415, "invalid_request_error", "unsupported_content_encoding")
HEADERS_TOO_LARGE = Row(431, "invalid_request_error", "headers_too_large")

NO_SUCH_PATH = Text("There is nothing at this path.", "No hay nada en esta ruta.")
WRONG_METHOD = Text("This path does not take this method.", "Esta ruta no admite este método.")
CODINGS_TAKEN = Text(
    "Content-Encoding must be gzip, deflate or identity.", "Content-Encoding debe ser gzip, deflate o identity."
)
TOO_MANY_HEADERS = Text("The request has too many headers.", "La petición tiene demasiadas cabeceras.")


def openai_body(row: Row, text: Text, language: str, param: str | None = None) -> dict[str, object]:
    """OpenAI's error object, all four keys always there."""
    return {"error": {"message": text.of(language), "type": row.type, "param": param, "code": row.code}}


def body_of(error: TruthGPTError, language: str) -> dict[str, object]:
    """The body of an error, also sent as an event inside a stream."""
    return openai_body(TABLE[type(error)], error.text, language, error.param)


def encode(body: dict[str, object], path: str) -> bytes:
    """Bytes of an error body in the form that the path's protocol has: KServe v2 wants `{"error": "<string>"}`."""
    if path.startswith("/v2/") or path == "/v2":
        error = body["error"]
        body = {"error": error["message"] if isinstance(error, dict) else error}
    return json.dumps(body).encode()


def headers_of(error: TruthGPTError) -> list[tuple[bytes, bytes]]:
    """Retry-After in whole seconds, never too early, for every error that says when to come back."""
    if error.retry_after_s is None:
        return []
    return [(b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode())]
