"""One request on its way out: a sink for each of its sequences, and what of their answers goes into a response."""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as Ids
from typing import Protocol

from .answer import Answer, Part
from .errors import EngineError
from .sequence import Delta


class Responder(Protocol):
    """One request's way back to its client. `started`: it has a slot, which its first text shows as well; `cached`: as
    many tokens of its prompt came from the prefix cache.
    """

    started: bool
    cached: int

    def send(self, parts: Ids[Part], final: bool) -> None: ...

    def fail(self, error: EngineError) -> None: ...

    def is_cancelled(self) -> bool: ...


class Running(Protocol):
    """What a stream has to know of a sequence; see sequence.Sequence."""

    cancelled: bool
    cached: int


class Post(Protocol):
    """Where a stream is taken to; see outbox.Outbox. May be called from any thread."""

    def take(self, stream: Stream, answer: Answer, delta: Delta) -> None: ...

    def fail(self, stream: Stream, error: EngineError) -> None: ...

    def announce(self, stream: Stream) -> None: ...


class Sink:
    """The sink of one sequence of a stream; see sequence.Sink."""

    def __init__(self, stream: Stream, answer: Answer) -> None:
        self._stream, self._answer = stream, answer

    def admitted(self) -> None:
        self._stream.outbox.announce(self._stream)

    def delta(self, delta: Delta) -> None:
        self._stream.outbox.take(self._stream, self._answer, delta)

    def error(self, error: EngineError) -> None:
        self._stream.outbox.fail(self._stream, error)


class Stream:
    """One request: an answer for each of its sequences, of which the best `keep` are returned. Without `streaming`
    everything goes out as one response at the end.
    """

    def __init__(self, outbox: Post, responder: Responder, streaming: bool, answers: Ids[Answer], keep: int) -> None:
        self.outbox, self.responder, self.streaming = outbox, responder, streaming
        self.answers, self._keep = tuple(answers), keep
        self.failure: EngineError | None = None
        self.closed = self.gone = self.notice = False
        self.sent_at = self.polled_at = time.monotonic()
        self._sequences: tuple[Running, ...] = ()

    @property
    def sinks(self) -> tuple[Sink, ...]:
        """One for each answer, in their order."""
        return tuple(Sink(self, answer) for answer in self.answers)

    def attach(self, *sequences: Running) -> None:
        """Whom to cancel when the client has gone or one of them fails; at once if that is so already."""
        self._sequences = sequences
        if self.gone:
            self.cancel()

    def cancel(self) -> None:
        """Nobody waits for the answers any more."""
        self.gone = True
        for sequence in self._sequences:
            sequence.cancelled = True
        self.detach()

    def detach(self) -> None:
        """Let go of the sequences, whose sinks refer to this: both would stay, and with them Triton's response sender,
        until a garbage collection, which may come when Triton's side of it is gone.
        """
        self._sequences = ()

    def echo(self, prompt: str) -> None:
        """Every answer begins with the prompt's text."""
        for answer in self.answers:
            answer.echo = prompt

    def tell_cached(self) -> None:
        """Let the next response say how much of the prompt the first answer took from the prefix cache."""
        if self._sequences:
            self.responder.cached = self._sequences[0].cached

    def error(self, error: EngineError) -> None:
        self.outbox.fail(self, error)

    def collect(self) -> list[Ids[Delta]]:
        """What has arrived for each answer, which it has no more."""
        return [answer.collect() for answer in self.answers]

    def write(self, arrived: Iterable[Ids[Delta]]) -> None:
        """Make text of what has arrived for each answer."""
        for answer, deltas in zip(self.answers, arrived, strict=True):
            answer.write(deltas)

    @property
    def has_news(self) -> bool:
        return any(answer.has_news for answer in self.answers)

    def parts(self) -> list[Part]:
        """Cut what goes out. Of answers that are not all returned that is the end: the likeliest first."""
        chosen: Iterable[Answer] = self.answers
        if self._keep < len(self.answers):
            chosen = sorted(self.answers, key=lambda answer: answer.mean_logprob, reverse=True)[: self._keep]
        return [answer.cut() for answer in chosen]

    def nothing(self) -> list[Part]:
        return [Part()] * self._keep
