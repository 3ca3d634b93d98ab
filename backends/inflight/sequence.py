"""One request's state while the engine works on it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ids
from typing import NamedTuple, Protocol

from .drafts import Lookup
from .errors import EngineError
from .request import SamplingParams
from .sampling import Pick, State
from .text import Detokenizer, StopFilter


class Delta(NamedTuple):
    """What one token added to an answer. `finish` is "stop", "length" or None while it goes on. `text` is what the
    token made certain where the answer has stop strings, for its end depends on that; else None: whoever sends the
    answer makes it, and an answer that ends with "stop" then has an end token last, which is not shown.
    """

    pick: Pick
    finish: str | None = None
    text: str | None = None


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
        self.started_at = 0.0  # when it got its slot
        self.sampling = State(params, prompt, frozenset() if params.ignore_eos else eos, vocab_size)
        self._detokenizer = Detokenizer(decode) if params.stop else None
        self._stops = StopFilter(params.stop)
        self.number = 0  # in order of submission
        self.slot = -1
        self.done = 0
        self.cached = 0  # tokens of the prompt whose cache was taken from others'
        self.generated = 0
        self.lookup: Lookup | None = None  # drafts of its next tokens, once it runs nearly alone
        self.exact: int | None = None  # so many positions at the start have the bits of decoding alone; None: all
        self.again = False  # its answer's positions are decoded again, up to the last token
        self.settled = False  # nothing more is speculated on it
        self.admitted = False  # it has had a slot
        self._cancelled = False
        self._tell_cancelled: Callable[[], None] | None = None

    @property
    def cancelled(self) -> bool:
        """Whether it was given up. Set by any thread, read once a step."""
        return self._cancelled

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        self._cancelled = value
        if value and self._tell_cancelled is not None:
            self._tell_cancelled()

    def when_cancelled(self, tell: Callable[[], None]) -> None:
        """What to call, in whichever thread, when it is given up; at once if it has been."""
        self._tell_cancelled = tell
        if self._cancelled:
            tell()

    @property
    def prefilling(self) -> bool:
        return self.done < self.prefill_end

    @property
    def prefill_end(self) -> int:
        """How many tokens are prefilled: all but the one that was picked last, which a decode step feeds, or the prompt
        alone.
        """
        return len(self.tokens) - (self.generated if self.again else self.generated > 0)

    def go_back(self, position: int) -> None:
        """Have the answer's positions from here on decoded again before another token is picked; see speculation.py."""
        self.done, self.exact, self.again, self.settled = position, None, True, True

    def fed(self) -> bool:
        """A decode step has fed a token; whether it was the last one, so that the next can be picked."""
        self.done += 1
        if self.done < len(self.tokens):
            return False
        self.again = False
        return True

    def accept(self, pick: Pick) -> Delta:
        """Take the token that was picked: whether the answer ends with it, and the text if that decides it."""
        token = pick.token
        self.sampling.accept(token)
        self.tokens.append(token)
        self.generated += 1
        ended = token in self.sampling.end
        finish = "stop" if ended else "length" if self.generated >= self.budget else None
        if self._detokenizer is None:
            return Delta(pick, finish)
        look = self.generated > self.params.min_tokens
        text = "" if ended else self._stops.push(self._detokenizer.push(token), look)
        if finish is not None:
            text += self._stops.push(self._detokenizer.flush(), look) + self._stops.flush()
        return Delta(pick, "stop" if self._stops.stopped else finish, text)
