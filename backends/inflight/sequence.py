"""One request's state while the engine works on it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import Protocol

from .errors import EngineError
from .request import SamplingParams
from .sampling import Pick, State
from .text import Detokenizer, StopFilter


@dataclass(frozen=True)
class Delta:
    """What one step added to an answer. `finish` is "stop", "length" or None while it goes on."""

    text: str
    tokens: int
    finish: str | None = None


class Sink(Protocol):
    """Where a sequence's answer goes. Called on the engine's thread: must not block."""

    def admitted(self) -> None: ...

    def delta(self, delta: Delta) -> None: ...

    def error(self, error: EngineError) -> None: ...


class Sequence:
    """A prompt on its way through prefill and decode. `done` counts positions that are in the cache.

    `tokens` are the prompt's and, behind them, those generated so far: all that the cache can be made of again.
    """

    def __init__(
        self,
        prompt: Ids[int],
        params: SamplingParams,
        budget: int,
        eos: frozenset[int],
        decode: Callable[[Ids[int]], str],
        sink: Sink,
        deadline: float,
        vocab_size: int,
    ) -> None:
        self.tokens = [*prompt]
        self.params = params
        self.budget = budget  # how many tokens may be generated
        self.sink = sink
        self.deadline = deadline  # on the engine's monotonic clock, seconds
        self.queued_at = 0.0  # on the same clock
        self.sampling = State(params, prompt, frozenset() if params.ignore_eos else eos, vocab_size)
        self.detokenizer = Detokenizer(decode)
        self.stops = StopFilter(params.stop)
        self.number = 0  # in order of submission
        self.slot = -1
        self.done = 0
        self.generated = 0
        self.next_token = -1
        self.admitted = False  # it has had a slot
        self.cancelled = False  # set by any thread, read once a step

    @property
    def prefilling(self) -> bool:
        return self.done < self.prefill_end

    @property
    def prefill_end(self) -> int:
        """How many tokens are prefilled: all but the one that was sampled last, which a decode step feeds."""
        return len(self.tokens) - (self.generated > 0)

    def accept(self, pick: Pick) -> Delta:
        """Take the token that was picked: the text it makes certain, and whether the answer ends with it."""
        token = self.next_token = pick.token
        self.sampling.accept(token)
        self.tokens.append(token)
        self.generated += 1
        if token in self.sampling.end:
            return Delta(self._rest(), 1, "stop")
        text = self.stops.push(self.detokenizer.push(token))
        if self.stops.stopped:
            return Delta(text, 1, "stop")
        if self.generated >= self.budget:
            text += self._rest()
            return Delta(text, 1, "stop" if self.stops.stopped else "length")
        return Delta(text, 1)

    def _rest(self) -> str:
        text = self.stops.push(self.detokenizer.flush())
        return text + self.stops.flush()
