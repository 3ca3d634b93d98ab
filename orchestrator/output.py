"""What is asked of a model's answer: it has text, and not more than the limit."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.domain import Chunk
from orchestrator.errors import EmptyAnswer


class OutputGuard:
    """One answer as it streams by. Characters are code points; where chunks begin and end makes no difference."""

    def __init__(self, max_chars: int) -> None:
        self._room = max_chars
        self._empty = True
        self.ended = False  # the limit was passed: nothing after the last chunk counts, stop the model

    def feed(self, chunk: Chunk) -> Chunk:
        """The chunk as far as the limit lets it; the one that passes the limit ends the answer with "length"."""
        if chunk.text:
            self._empty = False
        if len(chunk.text) > self._room:
            self.ended = True
        if self.ended:
            chunk = replace(chunk, text=chunk.text[: self._room], finish_reason="length")
        self._room -= len(chunk.text)
        return chunk

    def finish(self) -> None:
        """The answer is over. Raises EmptyAnswer when it had no character at all."""
        if self._empty:
            raise EmptyAnswer
