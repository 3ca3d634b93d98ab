"""Server-sent events: bytes split anywhere give the same events."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sse import EventParser, event

texts = st.lists(st.text(max_size=30), max_size=8)


@given(texts, st.data())
def test_any_split_gives_the_same_events(values: list[str], data: st.DataObject) -> None:
    """JSON events cut at any bytes, inside characters too, come out whole and in order."""
    wire = b"".join(event(json.dumps(value, ensure_ascii=False).encode()) for value in values)
    cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=12).map(sorted))
    parser = EventParser()
    parts = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    assert [json.loads(found) for part in parts for found in parser.feed(part)] == values
    assert parser.rest == b""


@given(st.binary(max_size=300), st.integers(1, 50))
def test_garbage_never_breaks_the_parser(wire: bytes, step: int) -> None:
    """Any bytes give the same events whole and piecewise, and no exception."""
    whole, pieces = EventParser(), EventParser()
    expected = whole.feed(wire)
    assert [found for at in range(0, len(wire), step) for found in pieces.feed(wire[at : at + step])] == expected


def test_lines_of_the_specification() -> None:
    """CRLF, comments, other fields, missing spaces and data of several lines follow the specification."""
    wire = b": hi\r\nevent: x\r\ndata:a\r\ndata: b\r\n\r\ndata\n\n\n\ndata:  c\n\n"
    assert EventParser().feed(wire) == [b"a\nb", b" c"]


@pytest.mark.parametrize("wire", [b"data: " + b"x" * 2000, b"data: x\n" * 400])
def test_an_endless_event_is_refused(wire: bytes) -> None:
    """An event past the limit raises instead of filling memory, in one line or in many."""
    with pytest.raises(ValueError, match="larger than 1000 bytes"):
        EventParser(limit_bytes=1000).feed(wire)
