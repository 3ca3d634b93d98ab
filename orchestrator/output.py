"""What is asked of a model's answer: it has text, and not more than the limit; and which of several are the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import orjson

from orchestrator.choices import Choice, merged, whole_reason
from orchestrator.domain import Chunk, GenerateRequest

LOGPROBS_MAX_CHARS = 4 << 20  # of one answer's, as JSON: 2,000 tokens with the twenty likeliest of each


class OutputGuard:
    """One answer as it streams by. Characters are code points; where chunks begin and end makes no difference."""

    holds = False  # everything back until the end

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


class ChoicesGuard:
    """Several answers, each with the whole limit for itself, or one with log-probabilities, which have one as well.

    An answer that has ended gets nothing more; that the model goes on with it counts in the chunk's tokens all the
    same. Of a request for the best of several there is one chunk, at the end.
    """

    def __init__(self, request: GenerateRequest, max_chars: int) -> None:
        self._n, self._logprobs = request.n, request.logprobs is not None
        self.holds = request.best_of > request.n
        self._kept: list[Chunk] = []
        self._guards = [OutputGuard(max_chars) for _ in range(request.answers)]
        self._rooms = [LOGPROBS_MAX_CHARS] * request.answers
        self._reasons: dict[int, str] = {}

    @property
    def empty(self) -> bool:
        return all(guard.empty for guard in self._guards)

    @property
    def ended(self) -> bool:
        return len(self._reasons) == len(self._guards)

    def feed(self, chunk: Chunk) -> Chunk:
        """The chunk as far as the limits let it."""
        choices = tuple(self._choice(one) for one in chunk.choices if one.index not in self._reasons)
        reason = whole_reason(self._reasons.values()) if self.ended else None
        text = "".join(choice.text for choice in choices)
        fed = replace(chunk, text=text, finish_reason=reason, choices=choices)
        if self.holds:
            self._kept.append(fed)
            return self._best(fed) if self.ended else fed
        return fed

    def _best(self, last: Chunk) -> Chunk:
        made = merged(choice for chunk in self._kept for choice in chunk.choices)
        choices = best(made, self._n, self._logprobs)
        text, tokens = "".join(choice.text for choice in choices), sum(chunk.tokens for chunk in self._kept)
        return replace(last, text=text, tokens=tokens, choices=choices, queue_s=self._kept[0].queue_s)

    def _choice(self, given: Choice) -> Choice:
        guard = self._guards[given.index]
        fed = guard.feed(Chunk(given.text, finish_reason=given.finish_reason))
        reason = fed.finish_reason
        self._rooms[given.index] -= len(given.logprobs)
        if self._rooms[given.index] < 0:
            reason = "length"
        if reason is not None:
            self._reasons[given.index] = reason
        return Choice(given.index, fed.text, given.tokens, reason, given.logprobs)


def best(answers: Sequence[Choice], n: int, keep_logprobs: bool) -> tuple[Choice, ...]:
    """The `n` whose tokens have the highest mean log-probability, best first and numbered anew; of equals the first."""
    ranked = sorted(answers, key=lambda answer: -_mean(answer.logprobs))
    return tuple(
        replace(answer, index=index, logprobs=answer.logprobs if keep_logprobs else "")
        for index, answer in enumerate(ranked[:n])
    )


def _mean(logprobs: str) -> float:
    entries = orjson.loads(logprobs) if logprobs else []
    return sum(entry["logprob"] for entry in entries) / len(entries) if entries else -math.inf
