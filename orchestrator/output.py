"""What is asked of a model's answer: it has text, and not more than the limit."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.domain import Chunk


class OutputGuard:
    """One answer as it streams by. Characters are code points; where chunks begin and end makes no difference."""

    def __init__(self, max_chars: int) -> None:
        self._room = max_chars
        self.empty = True  # it has had no character so far
        self.ended = False  # it has come to its end, or the limit was passed: nothing after the last chunk counts

    def feed(self, chunk: Chunk) -> Chunk:
        """The chunk as far as the limit lets it; the one that passes the limit ends the answer with "length"."""
        size = len(chunk.text)
        if size:
            self.empty = False
        if size > self._room or self.ended:
            chunk = replace(chunk, text=chunk.text[: self._room], finish_reason="length")
        self._room = max(0, self._room - size)
        self.ended = chunk.finish_reason is not None
        return chunk
