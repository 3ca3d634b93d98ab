"""One answer: what came when, how many tokens it has, and whether it is one at all.

    Fault         the answer does not count; `kind` says what was wrong in a word
    BenchError    nothing can be measured; `hint` says what to do

An answer that falls short in anything is a fault and never part of a latency: a status other than 200, an error inside
a 200, another content type, a body that makes no sense, a stream without its end, no tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import orjson

from orchestrator.masking import MASK, masked

MAX_MESSAGE = 300
SPARE_PIECES = 1000  # beyond four for each token that was asked for


class BenchError(Exception):
    """Nothing can be measured; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Fault(Exception):
    """An answer that does not count. `kind` is a word such as timeout, http_503, in_band, no_end."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(shown(message))
        self.kind = kind
        self._said = message[: 4 * MAX_MESSAGE]

    def without(self, secrets: Iterable[str]) -> Fault:
        """The same without these, should the server have repeated them."""
        text = self._said
        for secret in secrets:
            text = text.replace(secret, MASK)
        return Fault(self.kind, text)


class Reader(Protocol):
    """Takes one HTTP answer as it comes out of the socket. `now` is `time.perf_counter()` of the read. Raises Fault."""

    def head(self, status: int, content_type: str, encoding: str) -> None: ...
    def body(self, data: bytes, now: float) -> None: ...
    def end(self, now: float) -> None: ...


class Answer:
    """What is known of one answer. Moments are seconds of `time.perf_counter()`, 0 for what did not happen.

    `asked` is the bound of its output tokens, 0 for an encoder's. `gaps` are the times between two moments at which
    tokens came, each with the number that came at the second. What one read from the socket brought came at one moment.
    """

    def __init__(self, asked: int) -> None:
        self.asked = asked
        self.first = self.last = self.ended = 0.0
        self.pieces = 0  # events with text
        self.gaps: list[tuple[float, float]] = []
        self.counted: int | None = None  # output tokens as the server counts them
        self.prompt_tokens: int | None = None
        self._each_known = True

    def piece(self, now: float, tokens: int | None = None) -> None:
        """Text came; `tokens` of it, if the server says so. Raises Fault for a stream that never ends."""
        self.pieces += 1
        if self.pieces > 4 * self.asked + SPARE_PIECES:
            raise Fault("endless", f"{self.pieces} pieces and no end, though {self.asked} tokens were asked for")
        self._each_known &= tokens is not None
        came = 1 if tokens is None else tokens
        if not self.first:
            self.first = self.last = now
        elif now != self.last:
            self.gaps.append((now - self.last, came))
            self.last = now
        elif self.gaps:
            gap, before = self.gaps[-1]
            self.gaps[-1] = gap, before + came

    def count(self, output: object, prompt: object) -> None:
        """The server's counts so far, None for what it does not count. Raises Fault where they are none."""
        counted = natural("output", output)
        if counted is not None:
            if self.asked and counted > self.asked:
                raise Fault("wrong_usage", f"{counted} output tokens are counted, at most {self.asked} were asked for")
            self.counted = counted
        self.prompt_tokens = natural("prompt", prompt) or self.prompt_tokens

    def finish(self, now: float, streams: bool) -> None:
        """The answer has come to its orderly end. Raises Fault if there was nothing in it."""
        self.ended = now
        if not streams:
            self.first = self.last = now
        if not self.asked:
            return
        if not self.pieces:
            raise Fault("no_tokens", "the answer has no tokens")
        if self.counted == 0:
            raise Fault("wrong_usage", "no output tokens are counted in an answer with text")
        if not self._each_known and self.counted is not None:  # as many in each piece
            share = self.counted / self.pieces
            self.gaps = [(gap, came * share) for gap, came in self.gaps]

    @property
    def tokens(self) -> int:
        """Output tokens: the server's count, else one for each piece."""
        return self.pieces if self.counted is None else self.counted


class HttpReader:
    """What all HTTP answers share. `kind` is the content type that a good one has."""

    kind = "application/json"
    limit_bytes = 64 << 20  # of a whole body
    error_bytes = 64 << 10  # of the body of an error

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self._status = 0
        self._kept = bytearray()
        self._size = 0

    def head(self, status: int, content_type: str, encoding: str) -> None:
        self._status = status
        if status != 200:
            return
        kind = content_type.partition(";")[0].strip().lower()
        if kind != self.kind:
            raise Fault("content_type", f"the content type is {kind or 'missing'}, not {self.kind}")
        if encoding not in ("", "identity"):
            raise Fault("content_encoding", f"the body is encoded ({encoding}), which was not asked for")

    def body(self, data: bytes, now: float) -> None:
        self._size += len(data)
        if self._status != 200:
            self._kept += data
            if len(self._kept) > self.error_bytes:
                raise self._refused()
        elif self._size > self.limit_bytes:
            raise Fault("too_large", f"the body is larger than {self.limit_bytes} bytes")
        else:
            self.part(data, now)

    def end(self, now: float) -> None:
        if self._status != 200:
            raise self._refused()
        self.whole(now)

    def part(self, data: bytes, now: float) -> None:
        """Bytes of the body of a 200."""
        self._kept += data

    def whole(self, now: float) -> None:
        """The body of a 200 has ended."""
        raise NotImplementedError

    def _refused(self) -> Fault:
        body = bytes(self._kept[: self.error_bytes])
        text = error_text(parsed(body)) or body.decode("utf-8", "replace")
        return Fault(f"http_{self._status}", text.strip() or "no reason is given")


def parsed(data: bytes) -> Any:
    """The JSON value, None where it is none."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None  # every caller says that it makes no sense


def mapping(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object of an answer that is no error. Raises Fault."""
    value = parsed(data)
    if not isinstance(value, dict):
        raise Fault("nonsense", f"{what} is not a JSON object: {data[:100].decode('utf-8', 'replace')}")
    if value.get("error"):
        raise Fault("in_band", error_text(value) or "an error without a message")
    return value


def error_text(value: Any) -> str:
    """The sentence in an error body of OpenAI's or of KServe's form; empty where there is none."""
    error = value.get("error", value) if isinstance(value, dict) else None
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error.get("error")
    return error if isinstance(error, str) else ""


def natural(what: str, value: object) -> int | None:
    """A server's count. Raises Fault where it is none."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Fault("wrong_usage", f"the number of {what} tokens is {str(value)[:50]}")
    return value


def shown(text: str) -> str:
    """A server's words, fit for a terminal and a report: one line, short, without secrets."""
    line = " ".join(masked(text[: 4 * MAX_MESSAGE]).split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)[:MAX_MESSAGE]
