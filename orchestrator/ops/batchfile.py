"""The lines of a batch file, read as a stream, and what becomes of them, both in the form of OpenAI's batch API.

A line that cannot be asked is read as a BadLine, so that it fails no other. Memory is constant beside 16 bytes of
digest (and what a set needs) for every custom_id that was read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

MAX_LINE_BYTES = 8 << 20
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify")


class BatchError(Exception):
    """The batch cannot be run or go on; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Line:
    """A request to POST to `url`, a path; `number` counts the file's lines from 1, `body` is JSON."""

    number: int
    custom_id: str
    url: str
    body: bytes = field(repr=False)


@dataclass(frozen=True)
class BadLine:
    """A line that is not asked. `custom_id` is null where none can be told, or where another line has it already."""

    number: int
    custom_id: str | None
    code: str
    message: str


@dataclass(frozen=True)
class Source:
    """A batch file as it was found: the SHA-256 of its bytes, its size and how many lines are not blank."""

    path: Path
    sha256: str
    size: int
    lines: int
    _stamp: tuple[int, int, int] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> Source:
        """Read the file once, whatever its size. Raises BatchError where it is not a regular file, OSError."""
        if not path.is_file():
            raise BatchError(f"{path} is not a regular file", "a batch is read again when it resumes: give it a file")
        digest, lines, fresh, blank = hashlib.sha256(), 0, True, True
        with path.open("rb") as file:
            stamp = _stamp(file)
            while part := file.readline(MAX_LINE_BYTES):
                digest.update(part)
                blank = not part.strip() and (blank or fresh)
                fresh = part.endswith(b"\n")
                if fresh:
                    lines, blank = lines + (not blank), True
            lines += not (fresh or blank)
            size = file.tell()
        return cls(path, digest.hexdigest(), size, lines, stamp)

    def read(self) -> Iterator[Line | BadLine]:
        """Every line that is not blank, in order. Raises BatchError at the end when the file changed meanwhile."""
        seen: set[bytes] = set()
        with self.path.open("rb") as file:
            for number, raw in _raw_lines(file):
                yield _parse(number, raw, seen)
            if _stamp(file) != self._stamp:
                raise BatchError(
                    f"{self.path} was changed while it was read", "run the batch again with another --output"
                )


def answered(id: str, custom_id: str, status: int, request_id: str, body: object) -> dict[str, Any]:
    """The output line of a request that got an HTTP answer, whichever its status is."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": id, "custom_id": custom_id, "response": response, "error": None}


def failed(id: str, custom_id: str | None, code: str, message: str, number: int) -> dict[str, Any]:
    """The output line of a request that got no answer; `number` is its line in the input."""
    error = {"code": code, "message": message, "line": number}
    return {"id": id, "custom_id": custom_id, "response": None, "error": error}


def encode(row: dict[str, Any]) -> bytes:
    """One JSON line. Half surrogates, which JSON can hold and UTF-8 cannot, stay escaped."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"


def _stamp(file: IO[bytes]) -> tuple[int, int, int]:
    facts = os.fstat(file.fileno())
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _raw_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of every line that is not blank; None instead of one that is too long to be held."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        whole = raw.endswith(b"\n") or len(raw) <= MAX_LINE_BYTES
        blank = not raw.strip()
        part = raw
        while not part.endswith(b"\n") and (part := file.readline(MAX_LINE_BYTES)):
            blank = blank and not part.strip()
        if not blank:
            yield number, raw if whole else None


def _parse(number: int, raw: bytes | None, seen: set[bytes]) -> Line | BadLine:
    if raw is None:
        return BadLine(number, None, "line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        fields = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return BadLine(number, None, "invalid_json", f"the line is not JSON: {error}")
    if not isinstance(fields, dict):
        return BadLine(number, None, "invalid_line", "the line is not a JSON object")
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return BadLine(number, None, "invalid_line", "custom_id is missing or not a text")
    digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    if digest in seen:
        shown = custom_id[:200]
        return BadLine(number, None, "duplicate_custom_id", f"an earlier line has the custom_id {shown!r} too")
    seen.add(digest)
    try:
        body = json.dumps(fields.get("body"), allow_nan=False).encode()
    except (ValueError, RecursionError) as error:  # a number such as 1e999 reads as infinite
        return BadLine(number, custom_id, "invalid_line", f"body cannot be sent: {error}")
    wrong = _fault(fields)
    return BadLine(number, custom_id, *wrong) if wrong else Line(number, custom_id, fields["url"], body)


def _fault(fields: dict[str, Any]) -> tuple[str, str] | None:
    """Code and sentence of what makes these fields no request."""
    if fields.get("method") != "POST":
        return "invalid_line", 'method is missing or not "POST"'
    if fields.get("url") not in URLS:
        return "invalid_line", f"url is missing or none of {', '.join(URLS)}"
    body = fields.get("body")
    if not isinstance(body, dict):
        return "invalid_line", "body is missing or not an object"
    if body.get("stream"):
        return "stream_unsupported", "a batch has no streams: leave stream out of body"
    return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
