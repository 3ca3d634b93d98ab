"""Whether a series of samples grows with the requests that are served. Pure: no processes, no clocks.

A figure may rise while caches, pools and allocators fill, and it jumps up and down with what runs at the moment. So
only the second half of a run is looked at, cut into blocks whose medians are compared by the Theil-Sen estimator (the
median of the slopes between all pairs: Sen 1968), which up to 29 % of the points cannot mislead.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

BLOCKS = 12  # samples beside each other are not independent, and a block's median forgets a moment's peak
WARM_UP = 0.5  # part of the requests that is not looked at
PER = 10_000  # requests, the unit of slopes

Point = tuple[float, float]  # requests served so far, the figure


@dataclass(frozen=True)
class Bound:
    """How much a figure may grow: by `slope` in 10,000 requests, and by `rise` in all of what is looked at.

    Only what passes both has failed: the slope of a short run is mostly noise, and a page here or there is no leak.
    """

    slope: float
    rise: float


@dataclass(frozen=True)
class Finding:
    """What became of one figure: medians of the first and the last block, and growth in 10,000 requests."""

    begin: float
    end: float
    peak: float
    slope: float
    bound: Bound
    rise: float  # that the slope makes over what was looked at

    @property
    def flat(self) -> bool:
        return self.slope <= self.bound.slope or self.rise <= self.bound.rise


def theil_sen(points: Sequence[Point]) -> float:
    """The median slope between all pairs of points that differ in x; 0 where there are none."""
    slopes = [(b - y) / (a - x) for (x, y), (a, b) in itertools.combinations(points, 2) if a != x]
    return statistics.median(slopes) if slopes else 0.0


def blocks(points: Sequence[Point], count: int = BLOCKS) -> list[Point]:
    """The medians, in both coordinates, of at most `count` runs of neighbours of about the same length."""
    size = max(1.0, len(points) / count)
    cuts = [round(index * size) for index in range(min(count, len(points)) + 1)]
    parts = [points[begin:end] for begin, end in itertools.pairwise(cuts) if begin < end]
    return [(statistics.median(x for x, _ in part), statistics.median(y for _, y in part)) for part in parts]


def judge(points: Sequence[Point], bound: Bound) -> Finding:
    """Look at the second half of the requests. Raises ValueError when there are fewer than six samples of it."""
    warm = points[-1][0] * WARM_UP if points else 0.0
    seen = [point for point in points if point[0] >= warm]
    if len(seen) < BLOCKS // 2:
        raise ValueError(f"{len(seen)} samples after the warm-up are too few to judge by")
    medians = blocks(seen)
    slope = theil_sen(medians)
    rise = slope * (seen[-1][0] - seen[0][0])
    return Finding(medians[0][1], medians[-1][1], max(y for _, y in seen), slope * PER, bound, rise)
