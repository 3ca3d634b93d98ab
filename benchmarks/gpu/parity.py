"""How near answers and logits are to the reference's. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]


def first_difference(text: str, tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> int:
    """How many of the reference's tokens a text begins with."""
    for count in range(len(tokens), 0, -1):
        if text.startswith(decode(tokens[:count])):
            return count
    return 0


def drift(rows: Sequence[Row], expected: Sequence[Row]) -> float:
    """Root mean square of the error over the standard deviation of the expected logits; 1e9 where one is not finite."""
    error = np.mean(
        [np.square(row.astype(np.float64) - other).mean() for row, other in zip(rows, expected, strict=True)]
    )
    spread = np.mean([other.astype(np.float64).var() for other in expected])
    return float(np.sqrt(error / spread)) if np.isfinite(error) else 1e9


@dataclass
class Parity:
    """What was compared: `agreed` of `tokens` greedy tokens up to each answer's first other one, how far below the best
    that one was in standard deviations (`gap`), and logits of ours and of transformers beside fp32's.
    """

    agreed: int = 0
    tokens: int = 0
    gap: float = 0.0
    expected: list[Row] = field(default_factory=list)
    ours: list[Row] = field(default_factory=list)
    transformers: list[Row] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """For the result. `drift_transformers` is what the same precision costs transformers."""
        return {
            "greedy_agreement": self.agreed / self.tokens if self.tokens else 0.0,
            "gap": self.gap,
            "drift": drift(self.ours, self.expected),
            "drift_transformers": drift(self.transformers, self.expected),
            "rows": len(self.ours),
        }
