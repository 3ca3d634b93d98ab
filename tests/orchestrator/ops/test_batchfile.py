"""What a line of a batch may be, and what is said of one that is wrong."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.ops import batchfile
from orchestrator.ops.batchfile import BadLine, BatchError, Line, Source

from .batches import Echo, Row, do, line, write


@pytest.mark.parametrize(
    ("bad", "custom_id", "code"),
    [
        (b"{", None, "invalid_json"),
        (b"\xff\xfe", None, "invalid_json"),
        (b'{"custom_id": NaN}', None, "invalid_json"),
        (b"[" * 100_000, None, "invalid_json"),
        (b"[1]", None, "invalid_line"),
        (line(""), None, "invalid_line"),
        ({**line("b"), "custom_id": 7}, None, "invalid_line"),
        (line("b", method="GET"), "b", "invalid_line"),
        (line("b", url="/v1/files"), "b", "invalid_line"),
        (line("b", url=["/v1/completions"]), "b", "invalid_line"),
        (line("b", body=[]), "b", "invalid_line"),
        ({k: v for k, v in line("b").items() if k != "body"}, "b", "invalid_line"),
        (b'{"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"x": 1e999}}', "b", "invalid_line"),
        (line("b", body={"stream": True}), "b", "stream_unsupported"),
        (line("a"), None, "duplicate_custom_id"),
        (b'"' + b"x" * batchfile.MAX_LINE_BYTES + b'"', None, "line_too_long"),
    ],
    ids=lambda value: "" if isinstance(value, bytes | dict) else str(value),
)
def test_a_wrong_line_is_an_error_of_its_own(tmp_path: Path, bad: Any, custom_id: str | None, code: str) -> None:
    """Whatever is wrong with a line, it is told by its code, with its custom_id where it has one of its own."""
    source = Source.open(write(tmp_path / "in", line("a"), bad, b" ", line("z")))
    first, wrong, last = source.read()
    assert source.lines == 3
    assert isinstance(wrong, BadLine) and (wrong.number, wrong.custom_id, wrong.code) == (2, custom_id, code)
    assert isinstance(first, Line) and isinstance(last, Line) and (first.number, last.number) == (1, 4)


def test_a_line_as_long_as_allowed_is_read(tmp_path: Path) -> None:
    """The bound itself is allowed, with a newline or without."""
    text = json.dumps(line("a", "x")).encode()
    full = text.replace(b'"x"', b'"' + b"x" * (batchfile.MAX_LINE_BYTES - len(text) + 1) + b'"')
    assert len(full) == batchfile.MAX_LINE_BYTES
    (tmp_path / "in").write_bytes(full + b"\n" + full.replace(b'"a"', b'"b"'))
    assert [type(each) for each in Source.open(tmp_path / "in").read()] == [Line, Line]


def test_what_is_sent_is_the_body(tmp_path: Path) -> None:
    """A request is the body as JSON, whatever letters it holds; a mark at the file's beginning is no part of it."""
    wanted = line("ñ", "¿Qué tal? \ud800 \u2028")
    (only,) = Source.open(write(tmp_path / "in", b"\xef\xbb\xbf" + json.dumps(wanted).encode())).read()
    assert isinstance(only, Line) and json.loads(only.body) == wanted["body"] and only.custom_id == "ñ"


@settings(max_examples=150)
@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([json.dumps(line(c)).encode() for c in "abc"]))))
def test_any_bytes_are_read(lines: list[bytes]) -> None:
    """No input makes reading fail; the count of lines is the number of results, and no custom_id is asked twice."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in"
        path.write_bytes(b"\n".join(lines))
        source = Source.open(path)
        found = list(source.read())
    assert len(found) == source.lines
    asked = [each.custom_id for each in found if isinstance(each, Line)]
    assert len(asked) == len(set(asked))
    numbers = [each.number for each in found]
    assert numbers == sorted(set(numbers))


async def test_an_input_that_changes_is_noticed(tmp_path: Path) -> None:
    """Lines that were added or changed while a batch runs end it with an error, because its answers fit nothing."""
    file = write(tmp_path / "in", line("a"), line("b"))

    class Meddler(Echo):
        async def ask(self, line: Line, id: str) -> Row:
            with file.open("ab") as more:
                more.write(b"\n\n")
            return await super().ask(line, id)

    with pytest.raises(BatchError, match="was changed"):
        await do(file, tmp_path / "out", Meddler(concurrency=1))
    assert not (tmp_path / "out").exists()
