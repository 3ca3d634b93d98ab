"""The gRPC edge's table over the error tree."""

from __future__ import annotations

import pytest
from grpc import StatusCode

from orchestrator import errors
from orchestrator.api import errors as http
from orchestrator.api.grpc_errors import MAX_CHARS, TABLE, details_of, metadata_of
from orchestrator.errors import Text, TruthGPTError

from ..test_errors import make, tree

# The house's mapping; 413 has no row there: gRPC says RESOURCE_EXHAUSTED itself of a message that is too large.
CODES = {
    400: StatusCode.INVALID_ARGUMENT, 401: StatusCode.UNAUTHENTICATED, 403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND, 409: StatusCode.ABORTED, 413: StatusCode.RESOURCE_EXHAUSTED,
    429: StatusCode.RESOURCE_EXHAUSTED, 499: StatusCode.CANCELLED, 500: StatusCode.INTERNAL,
    501: StatusCode.UNIMPLEMENTED, 503: StatusCode.UNAVAILABLE, 504: StatusCode.DEADLINE_EXCEEDED,
}  # fmt: skip


def test_table_is_total_and_has_no_strangers() -> None:
    """Every class of the tree has its own row and every row is a class of the tree."""
    assert set(TABLE) == set(tree())


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.__name__)
def test_both_edges_say_the_same(kind: type[TruthGPTError]) -> None:
    """Each error has the code that its HTTP status maps to, its sentence in both languages, and when to come back."""
    error = make(kind)
    assert TABLE[kind] is CODES[http.TABLE[kind].status]
    assert details_of(error, "es") == error.text.es != details_of(error, "en")
    assert metadata_of(error) == http.headers_of(error)


def test_a_long_text_is_cut() -> None:
    """What a model says of a request may be of any length; a status' details may not."""
    assert details_of(errors.InvalidRequest(Text("x" * 10_000, "")), "en") == "x" * MAX_CHARS
