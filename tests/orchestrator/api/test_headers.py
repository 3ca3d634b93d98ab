"""What is read of a request first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.headers import language_of


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("", "en"),
        ("es", "es"),
        ("es-MX,es;q=0.9,en;q=0.8", "es"),
        ("en;q=0.5, ES;q=0.9", "es"),
        ("fr, de", "en"),
        ("fr, es;q=0.1", "es"),
        ("es;q=0, en;q=0.1", "en"),
        ("es;q=nonsense", "en"),
        ("en, es", "en"),
        (";;;,,,", "en"),
    ],
)
def test_language_is_negotiated(header: str, language: str) -> None:
    """The highest weight of English and Spanish wins."""
    assert language_of(header.encode()) == language


@given(st.binary(max_size=200))
def test_any_language_header_is_survived(header: bytes) -> None:
    """No header breaks the negotiation."""
    assert language_of(header) in ("en", "es")
