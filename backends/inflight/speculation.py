"""When drafts are worth verifying, and what exactness asks of it.

Feeding a draft costs little more than feeding one token while few sequences run, for a step is bound by reading the
weights. Whether it pays is a matter of measured costs and of how often drafts have been right.

On the CPU in float32 a step over one token of a row and one over several differ in the last bits (ONNX Runtime's
attention takes another kernel for one query). So what was verified is taken only where no other bits could have changed
it; see `too_close`.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
from numpy.typing import NDArray

from .costs import Costs
from .drafts import Lookup
from .sequence import Sequence

MAX_ROWS = 2  # sequences that may run at once: each is verified by itself, while decoding takes all in one go
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # of drafts
GAIN = 1.05  # tokens per second with drafts over those without, from which on they are verified
USUAL = 0.3  # how often drafts are right before anything is known
USUAL_WEIGHT = 0.02  # of a verified token in what is usual
# Steps over one and over several tokens were seen to move a logit by 6e-6 of the row's standard deviation at most
# (GPT-2-small's shape and a trained model): with two logits moving, this is five times what was seen.
MARGIN = 6e-5


class Speculation:
    """Chooses drafts. `exact`: the model is one whose answers are the same to the last token, alone or in company."""

    def __init__(self, costs: Costs, exact: bool) -> None:
        self._costs, self._exact = costs, exact
        self.usual = USUAL

    def drafts(self, sequences: Rows[Sequence]) -> dict[Sequence, list[int]]:
        """Whose drafts are to be verified instead of decoding one token, as many as make most tokens per second: empty
        where that gains nothing.
        """
        rows, plain_s = len(sequences), self._costs.decode(len(sequences))
        if rows > MAX_ROWS or not plain_s:
            return {}
        found = [(sequence, *self._draft(sequence)) for sequence in sequences if self._may(sequence)]
        found = [(sequence, draft, makes) for sequence, draft, makes in found if draft]
        found.sort(key=lambda one: one[2] / self._costs.verify(1 + len(one[1])), reverse=True)
        chosen, best, tokens, seconds = 0, GAIN * rows, 0.0, 0.0  # tokens in the time of a plain step
        for count, (_, draft, makes) in enumerate(found, 1):
            tokens += makes
            seconds += self._costs.verify(1 + len(draft))
            left = rows - count
            made = (tokens + left) * plain_s / (seconds + (plain_s if left else 0.0))
            if made > best:
                chosen, best = count, made
        return {sequence: draft for sequence, draft, _ in found[:chosen]}

    def learn(self, drafted: int, accepted: int) -> None:
        """So many tokens of a draft were right."""
        compared = min(accepted + 1, drafted)
        self.usual += (accepted / compared - self.usual) * min(1.0, USUAL_WEIGHT * compared)

    def _may(self, sequence: Sequence) -> bool:
        if not self._exact:
            return True
        how = sequence.params
        penalties = how.repetition_penalty != 1 or how.presence_penalty or how.frequency_penalty or how.logit_bias
        return not (how.temperature > 0 or penalties or sequence.settled or sequence.generated < how.min_tokens)

    def _draft(self, sequence: Sequence) -> tuple[list[int], float]:
        """The draft of the length that makes most tokens per second, and how many tokens it is expected to make."""
        if sequence.lookup is None:
            sequence.lookup = Lookup(sequence.tokens, len(sequence.tokens) - sequence.generated)
        sequence.lookup.follow()
        room = sequence.budget - sequence.generated - 1
        draft = sequence.lookup.draft(min(LENGTHS[-1], room))
        right = min(0.999, sequence.lookup.acceptance(self.usual))
        best, best_rate, expected = 0, 0.0, 1.0
        for length in LENGTHS:
            if length > len(draft):
                break
            makes = (1 - right ** (length + 1)) / (1 - right)
            rate = makes / self._costs.verify(1 + length)
            if rate > best_rate:
                best, best_rate, expected = length, rate, makes
        return draft[:best], expected


def too_close(logits: NDArray[np.float32]) -> bool:
    """Whether the largest of float32 [vocab] has a runner-up so near that other last bits could change places."""
    first = int(logits.argmax())
    rest = max(logits[:first].max(initial=-np.inf), logits[first + 1 :].max(initial=-np.inf))
    return bool(logits[first] - rest <= MARGIN * logits.std())
