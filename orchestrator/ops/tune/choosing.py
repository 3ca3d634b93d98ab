"""Which candidates are the best, and whether one is better than what is set. Pure rules over what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from orchestrator.ops.tune.figures import Bounds, Figures
from orchestrator.ops.tune.knobs import Point, key

SLACK = 1.15  # bounds are stretched by so much for what was measured once; the final rounds take them as they are
FINALISTS = 2
SURE = 0.8  # of the rounds a winner has to be faster in: a lucky median of noise alone is not
Measured = tuple[Point, Figures]
Round = Mapping[tuple[tuple[str, str], ...], Figures]  # by `key`


@dataclass(frozen=True)
class Verdict:
    """What the final rounds say of one finalist: throughput against what is set, the median over rounds; `kept`: it
    keeps the bounds; `better`: it should take the place of what is set.
    """

    point: Point
    figures: Figures  # medians
    ratio: float
    kept: bool
    better: bool


def frontier(measured: Iterable[Measured]) -> list[Measured]:
    """Those that no other one beats in throughput and latency both, the fastest first."""
    best: list[Measured] = []
    latency = float("inf")
    for point, figures in sorted(measured, key=lambda one: (-one[1].throughput, one[1].latency_s)):
        if figures.latency_s < latency:
            best.append((point, figures))
            latency = figures.latency_s
    return best


def distance(point: Point, current: Point) -> int:
    """How many values differ."""
    return sum(point[name] != current[name] for name in current)


def reversions(point: Point, current: Point) -> list[dict[str, str]]:
    """The points that have one of its changes less: one that gains nothing is not to be made."""
    changed = [name for name in current if point[name] != current[name]]
    return [{**point, name: current[name]} for name in changed] if len(changed) > 1 else []


def finalists(measured: Sequence[Measured], current: Measured, bounds: Bounds, margin: float) -> list[Point]:
    """At most FINALISTS points that may be better than what is set: the fastest, and the best of those that have one of
    its changes less, whatever a single measurement made of it; else the next.
    """
    loose = bounds.scaled(SLACK)
    promising = not bounds.kept(current[1])  # then any that keeps them is
    found = [
        (point, figures) for point, figures in measured
        if key(point) != key(current[0]) and loose.kept(figures)
        and (promising or figures.throughput > current[1].throughput * (1 + margin / 2))
    ]  # fmt: skip
    found.sort(key=lambda one: (-one[1].throughput, distance(one[0], current[0])))
    if not found:
        return []
    best, *others = found
    fewer = {key(point) for point in reversions(best[0], current[0])}
    simpler = sorted((one for one in measured if key(one[0]) in fewer), key=lambda one: -one[1].throughput)
    return [point for point, _ in [best, *(simpler or others)][:FINALISTS]]


def verdicts(
    rounds: Sequence[Round], current: Point, relative: float | None, bounds: Bounds, margin: float
) -> list[Verdict]:
    """What the rounds say of each finalist, the best first.

    `relative`: the bounds are so many times what is set, measured in the same round. A finalist is better when it is so
    by `margin` (0.05 for 5 %) and faster in most rounds, or when it keeps the bounds and what is set does not.
    """
    points = {one: None for round_ in rounds for one in round_ if one != key(current)}
    set_ = medians([round_[key(current)] for round_ in rounds])
    found = []
    for one in points:
        pairs = [(round_[one], round_[key(current)]) for round_ in rounds if one in round_]
        ratios = [figures.throughput / there.throughput for figures, there in pairs]
        ratio, sure = median(ratios), sum(one > 1 for one in ratios) >= SURE * len(ratios)
        figures = medians([figures for figures, _ in pairs])
        if relative is None:
            kept, mends = bounds.kept(figures), not bounds.kept(set_)
        else:
            kept, mends = all(value <= relative for value in _ratios(pairs)), False
        better = kept and ((ratio >= 1 + margin and sure) or mends) and len(pairs) == len(rounds)
        point = {name: dict(one)[name] for name in current}
        found.append(Verdict(point, figures, ratio, kept, better))
    return sorted(found, key=lambda one: (-one.better, -one.ratio))


def winner(found: Sequence[Verdict], current: Point, margin: float) -> Verdict | None:
    """The best; of those that hardly differ from it, the one with the fewest changes."""
    good = [one for one in found if one.better]
    if not good:
        return None
    near = [one for one in good if one.ratio >= good[0].ratio - margin]
    return min(near, key=lambda one: (distance(one.point, current), -one.ratio))


def _ratios(pairs: Sequence[tuple[Figures, Figures]]) -> list[float]:
    """Of each percentile, the median of what it is against what is set."""
    found = []
    for name in ("latency_s", "ttft_s", "itl_s"):
        values = [(getattr(a, name), getattr(b, name)) for a, b in pairs]
        ratios = [mine / its for mine, its in values if mine is not None and its]
        if ratios:
            found.append(median(ratios))
    return found


def medians(figures: Sequence[Figures]) -> Figures:
    """Of each figure."""

    def of(name: str) -> float | None:
        values = [value for one in figures if (value := getattr(one, name)) is not None]
        return median(values) if values else None

    return Figures(
        of("throughput") or 0.0, of("latency_s") or 0.0, of("ttft_s"), of("itl_s"),
        sum(one.requests for one in figures), of("rate") or 0.0,
    )  # fmt: skip
