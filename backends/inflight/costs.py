"""What steps take on this machine, measured as they run, and what follows from it for the next one.

A run over n tokens of one row reads the weights once, as a decode step of one row does, and then costs as much again
for each further token: seconds = decode(1) + each × (n − 1). Only `each` has to be learnt, so one size that was seen
says something of all.
"""

from __future__ import annotations

WEIGHT = 0.1  # of a new sample in a running estimate
CLIP = 2.0  # a sample counts as at most this many times the estimate, at least its inverse: a machine may stall


class Estimate:
    """A running mean of positive samples, robust against single outliers."""

    def __init__(self) -> None:
        self.value = 0.0
        self.samples = 0

    def add(self, sample: float) -> None:
        self.samples += 1
        if self.samples > 3:  # the first ones may be far off
            sample = min(max(sample, self.value / CLIP), self.value * CLIP)
        self.value += (sample - self.value) * max(WEIGHT, 1 / self.samples)


class Costs:
    """Running estimates in seconds. 0 for what has not been measured yet."""

    def __init__(self) -> None:
        self._decode: dict[int, Estimate] = {}
        self._prefill, self._verify = Estimate(), Estimate()  # of one more token

    def decoded(self, rows: int, seconds: float) -> None:
        """A decode step over so many rows took so long."""
        self._decode.setdefault(rows, Estimate()).add(seconds)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Prefilling so many tokens in one go took so long."""
        self._more(self._prefill, tokens, seconds)

    def verified(self, tokens: int, seconds: float) -> None:
        """Feeding so many tokens of one row, with logits for each, took so long."""
        self._more(self._verify, tokens, seconds)

    def decode(self, rows: int) -> float:
        """What a decode step over so many rows takes: as measured, or as the nearest number of rows takes."""
        if not self._decode:
            return 0.0
        return self._decode[min(self._decode, key=lambda known: (abs(known - rows), known))].value

    def prefill(self, tokens: int) -> float:
        """What a chunk of so many tokens takes."""
        return self.decode(1) + self._prefill.value * (tokens - 1)

    def verify(self, tokens: int) -> float:
        """What it takes to feed so many tokens of one row with logits for each: before the first time as prefill."""
        each = self._verify if self._verify.samples else self._prefill
        return self.decode(1) + each.value * (tokens - 1)

    def chunk(self, rows: int, target_s: float, least: int, most: int) -> int:
        """How many prompt tokens fit into a step of `target_s` beside a decode step over `rows` rows: an even number
        (see steps.Steps.prefill) from `least` to `most`.
        """
        if not self._prefill.value or not self._decode:
            return least
        left = target_s - self.decode(rows) - self.prefill(1)
        return min(most, max(least, int(left / self._prefill.value) // 2 * 2))

    def _more(self, estimate: Estimate, tokens: int, seconds: float) -> None:
        if tokens > 1:
            estimate.add(max(seconds - self.decode(1), seconds * 0.01) / (tokens - 1))
