"""One answer while it is made: what of it there is so far, and who listens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol

from orchestrator.domain import Chunk
from orchestrator.errors import TruthGPTError

_numbers = itertools.count(1)


class Outcome:
    """What the upstream tells beside its chunks, before the first of them.

    `fallback` is as in domain.Notes; an answer with one is never stored.
    """

    def __init__(self) -> None:
        self.fallback: str | None = None


Put = Callable[[Chunk], object]  # takes the next chunk of an answer, at once


class Listener(Protocol):
    """Who is to be woken; reads `chunks` from wherever it stands, and `ended` and `error` after the last one."""

    def wake(self) -> None: ...


class Broadcast:
    """The chunks of one answer. `on_empty` is called when the last listener leaves before the end.

    Adding a chunk never waits: it is kept, and each listener reads at its own pace, from the beginning.
    """

    def __init__(self, on_empty: Callable[[], None]) -> None:
        self.number = next(_numbers)  # in this process
        self.chunks: list[Chunk] = []
        self.outcome = Outcome()
        self.ended = False
        self.error: TruthGPTError | None = None
        self._listeners: dict[Listener, None] = {}
        self._on_empty: Callable[[], None] | None = on_empty

    @property
    def complete(self) -> bool:
        """Whether the last chunk is there, so that nobody's leaving can cut the answer short."""
        return bool(self.chunks) and self.chunks[-1].finish_reason is not None

    def join(self, listener: Listener) -> None:
        self._listeners[listener] = None

    def leave(self, listener: Listener) -> None:
        """A second time does nothing."""
        if listener in self._listeners:
            del self._listeners[listener]
            if not self._listeners and self._on_empty is not None:
                self._on_empty()

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        for listener in self._listeners:
            listener.wake()

    def end(self, error: TruthGPTError | None = None) -> None:
        """No chunk comes any more; only the first call counts."""
        if not self.ended:
            self.ended, self.error = True, error
            self._on_empty = None  # who made this has a reference to it: only the garbage collector would free the two
            for listener in self._listeners:
                listener.wake()
