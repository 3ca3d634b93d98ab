"""Server-sent events (WHATWG HTML, section 9.2): rendering, and a parser that takes bytes split anywhere."""

from __future__ import annotations

DONE = b"data: [DONE]\n\n"


def event(data: bytes) -> bytes:
    """One event; `data` must hold no line break, as JSON does not."""
    return b"data: " + data + b"\n\n"


class EventParser:
    """Collects the data of events. Lines may end with LF or CRLF; comments and fields other than `data` are skipped."""

    def __init__(self, limit_bytes: int = 1 << 20) -> None:
        self._limit_bytes = limit_bytes
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, received: bytes) -> list[bytes]:
        """The data of the events that these bytes complete. Raises ValueError when one grows past the limit."""
        if not self._rest and not self._data and received.startswith(b"data: ") and received.endswith(b"}\n\n"):
            if received.count(b"\n") == 2 and len(received) <= self._limit_bytes:
                return [received[6:-2]]  # exactly one event of JSON, as nearly all are
        *lines, self._rest = (self._rest + received).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
                self._size += len(line)
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data, self._size = [], 0
        if len(self._rest) + self._size > self._limit_bytes:
            raise ValueError(f"an event is larger than {self._limit_bytes} bytes")
        return events

    @property
    def rest(self) -> bytes:
        """Bytes of the last line, not yet ended."""
        return self._rest
