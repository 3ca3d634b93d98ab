"""The gRPC edge's error table, one row for every class of the tree, and what a client reads of an error."""

from __future__ import annotations

from collections.abc import Mapping

from grpc import StatusCode

from orchestrator import errors
from orchestrator.api.errors import headers_of
from orchestrator.errors import Text, TruthGPTError

MAX_CHARS = 1000  # of a status' details: they travel in a header, which clients take only so much of

TABLE: Mapping[type[TruthGPTError], StatusCode] = {
    errors.InvalidRequest: StatusCode.INVALID_ARGUMENT,
    errors.PayloadTooLarge: StatusCode.RESOURCE_EXHAUSTED,  # as gRPC itself says it of a message
    errors.UnsafeInput: StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: StatusCode.PERMISSION_DENIED,
    errors.RateLimited: StatusCode.RESOURCE_EXHAUSTED,
    errors.ModelNotFound: StatusCode.NOT_FOUND,
    errors.Overloaded: StatusCode.UNAVAILABLE,
    errors.OutOfMemory: StatusCode.UNAVAILABLE,
    errors.Unavailable: StatusCode.UNAVAILABLE,
    errors.GatewayFull: StatusCode.UNAVAILABLE,
    errors.Draining: StatusCode.UNAVAILABLE,
    errors.KeysUnavailable: StatusCode.UNAVAILABLE,
    errors.LimitsUnavailable: StatusCode.UNAVAILABLE,
    errors.BreakerOpen: StatusCode.UNAVAILABLE,
    errors.UpstreamUnavailable: StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: StatusCode.CANCELLED,
    errors.InternalError: StatusCode.INTERNAL,
    errors.UpstreamError: StatusCode.INTERNAL,
    errors.EmptyAnswer: StatusCode.INTERNAL,
    TruthGPTError: StatusCode.INTERNAL,
}
NOT_A_MESSAGE = Text(
    "The request is not the message that this method takes.", "La petición no es el mensaje que este método espera."
)


def details_of(error: TruthGPTError, language: str) -> str:
    """The sentence for people, in their language."""
    return error.text.of(language)[:MAX_CHARS]


def metadata_of(error: TruthGPTError) -> list[tuple[bytes, bytes]]:
    """Trailing metadata that an error brings: retry-after in whole seconds, never too early."""
    return headers_of(error)
