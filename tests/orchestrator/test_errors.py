"""The error tree and the HTTP edge's table over it."""

from __future__ import annotations

import inspect

import pytest

from orchestrator import errors
from orchestrator.api.errors import TABLE, body_of, encode, headers_of
from orchestrator.errors import CALLERS_FAULT, Text, TruthGPTError


def tree(root: type[TruthGPTError] = TruthGPTError) -> list[type[TruthGPTError]]:
    return [root, *(found for child in root.__subclasses__() for found in tree(child))]


def make(kind: type[TruthGPTError]) -> TruthGPTError:
    """An instance with whatever arguments its class requires."""
    values = {"text": Text("Something.", "Algo."), "limit_bytes": 10, "model": "m", "limit": 3, "window": "minute"}
    values["retry_after_s"] = 2.0
    needed = [name for name, p in inspect.signature(kind).parameters.items() if p.default is p.empty and name != "self"]
    return kind(*(values[name] for name in needed))


def test_table_is_total_and_has_no_strangers() -> None:
    """Every class of the tree has its own row and every row is a class of the tree."""
    assert set(TABLE) == set(tree())


def test_docstring_draws_every_class() -> None:
    """The drawing in the module's docstring names the whole tree."""
    assert errors.__doc__ is not None
    assert [kind.__name__ for kind in tree() if kind.__name__ not in errors.__doc__] == []


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.__name__)
def test_every_error_can_be_answered(kind: type[TruthGPTError]) -> None:
    """Each error renders in both languages with four keys, and 429 and 503 always say when to come back."""
    error = make(kind)
    assert error.text.en != error.text.es
    for language in ("en", "es"):
        body = body_of(error, language)["error"]
        assert isinstance(body, dict)
        assert set(body) == {"message", "type", "param", "code"}
        assert body["message"] == error.text.of(language)
    status = TABLE[kind].status
    assert (status in (429, 503)) == (dict(headers_of(error)).get(b"retry-after", b"0") >= b"1")
    assert error.retryable == (status in (429, 503, 504))


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.__name__)
def test_the_callers_faults_are_those_of_the_http_table(kind: type[TruthGPTError]) -> None:
    """An error is the caller's fault if and only if HTTP answers it with 4xx; metrics and spans go by its kind."""
    assert kind.callers_fault == (TABLE[kind].status < 499) == (kind.kind in CALLERS_FAULT)


def test_details_are_never_shown() -> None:
    """What an internal error carries for the log does not reach its body."""
    assert b"secret" not in encode(body_of(errors.UpstreamError("secret"), "en"), "/v1/x")


def test_kserve_errors_are_strings() -> None:
    """Under /v2/ the body is the one KServe clients parse."""
    assert encode(body_of(errors.Draining(), "en"), "/v2/models") == (
        b'{"error": "The service is stopping. Please send the request again."}'
    )
