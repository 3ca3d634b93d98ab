"""From the rounds' figures to medians, and from those to the bars G1 to G5: reached or not, with the figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gateway_measure import HIT_1, HIT_32, REQUEST_1, REQUEST_32, STREAM_1, STREAM_32

GRPC_1, GRPC_32 = "gRPC infer, C=1", "gRPC infer, C=32"
GRPC_STREAM_1, GRPC_STREAM_32 = "gRPC stream of 16, C=1", "gRPC stream of 16, C=32"
FLAT = 0.02  # of the memory after the first mark: what it may grow by until the second one, and still be called flat

Round = Mapping[str, Mapping[str, Mapping[str, Any]]]  # system -> run -> figure


@dataclass(frozen=True)
class Bar:
    """One promise. `figure` is ours in `unit`, `limit` what it is held against; `reached` is None without a result."""

    bar: str
    what: str
    figure: float | None
    limit: float
    at_most: bool
    unit: str
    ours: float | None = None
    theirs: float | None = None

    @property
    def reached(self) -> bool | None:
        if self.figure is None:
            return None
        return self.figure <= self.limit if self.at_most else self.figure >= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reached": self.reached}


def medians(rounds: list[Round]) -> dict[str, dict[str, dict[str, Any]]]:
    """Each system's runs: the median of each figure over the rounds, and what was measured in each one.

    A run that failed in any round has `errors` and no figures.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for system in rounds[0]:
        for run in rounds[0][system]:
            rows = [one[system][run] for one in rounds]
            errors = [row["errors"] for row in rows if row["errors"]]
            if errors:
                found.setdefault(system, {})[run] = {"errors": errors}
                continue
            names = [name for name in rows[0] if name not in ("errors", "discarded")]
            figures: dict[str, Any] = {
                name: round(statistics.median(row[name] for row in rows), 4) for name in names
            }  # fmt: skip
            if discarded := [row["discarded"] for row in rows if "discarded" in row]:
                figures["discarded"] = discarded
            figures["rounds"] = {
                name: [row[name] for row in rows] for name in ("per_s", "p50_ms", "cpu_us") if name in rows[0]
            }
            found.setdefault(system, {})[run] = figures
    return found


def added(rounds: list[Round], system: str, base: str, run: str, figure: str) -> float | None:
    """Milliseconds that a system adds to what is behind it: the median over rounds of the difference within a round."""
    rows = [(one.get(system, {}).get(run, {}), one.get(base, {}).get(run, {})) for one in rounds]
    if not all(figure in mine and figure in theirs for mine, theirs in rows):
        return None
    return round(float(statistics.median(mine[figure] - theirs[figure] for mine, theirs in rows)), 4)


def ratio(rounds: list[Round], run: str, figure: str, system: str, other: str) -> float | None:
    """The median over rounds of a figure of one system over that of another in the same round."""
    rows = [(one.get(system, {}).get(run, {}), one.get(other, {}).get(run, {})) for one in rounds]
    if not all(mine.get(figure) and theirs.get(figure) for mine, theirs in rows):
        return None
    return round(float(statistics.median(mine[figure] / theirs[figure] for mine, theirs in rows)), 3)


def bars(rounds: list[Round], memory: Mapping[str, Any], growth: Mapping[str, Any] | None) -> list[Bar]:
    """Every bar whose systems were measured. `memory` is PSS in 10^6 bytes by system, `growth` that of the long run.

    Ours is judged by `growth` alone: at the time of `memory` two of ours run, and share what both map.
    """
    middle = medians(rounds)

    def value(system: str, run: str, figure: str) -> float | None:
        found = middle.get(system, {}).get(run, {}).get(figure)
        return None if found is None else float(found)

    def faster(bar: str, what: str, run: str, other: str, limit: float, mine: str = "ours") -> Bar:
        figures = (value(mine, run, "per_s"), value(other, run, "per_s"))
        return Bar(bar, what, ratio(rounds, run, "per_s", mine, other), limit, False, "×", *figures)

    def quicker(bar: str, other: str, limit: float) -> Bar:
        mine = added(rounds, "ours", "direct", REQUEST_1.name, "p50_ms")
        theirs = added(rounds, other, "direct", REQUEST_1.name, "p50_ms")
        return Bar(bar, "added p50", _over(mine, theirs), limit, True, "× theirs", mine, theirs)

    def smaller(bar: str, other: str, limit: float) -> Bar:
        after = growth["points"][-1]["pss"] if growth else None
        return Bar(bar, "memory", _over(after, memory.get(other)), limit, True, "× theirs", after, memory.get(other))

    def costs(bar: str, what: str, figure: float | None, limit: float, unit: str) -> Bar:
        return Bar(bar, what, figure, limit, True, unit)

    found: list[Bar] = []
    if "litellm" in middle and "ours" in middle:
        found += [
            quicker("G1", "litellm", 0.1),
            faster("G1", "requests/s at 32", REQUEST_32.name, "litellm", 20),
            faster("G1", "streams/s at 32", STREAM_32.name, "litellm", 10),
            faster("G1", "cache hits/s at 32", HIT_32.name, "litellm-full", 40),
            smaller("G1", "litellm", 0.25),
        ]
    if "portkey" in middle and "ours" in middle:
        found += [
            quicker("G2", "portkey", 0.75),
            faster("G2", "requests/s at 32", REQUEST_32.name, "portkey", 2.5),
            faster("G2", "streams/s at 32", STREAM_32.name, "portkey", 1.5),
            smaller("G2", "portkey", 0.5),
        ]
    through = "ours-triton"
    if through in middle and REQUEST_1.name in middle[through]:
        plus: Callable[[str, str], float | None] = lambda run, figure: added(rounds, through, "triton", run, figure)  # noqa: E731
        found += [
            costs("G3", "added p50", plus(REQUEST_1.name, "p50_ms"), 0.6, "ms"),
            costs("G3", "added to the first chunk, p50", plus(STREAM_1.name, "first_p50_ms"), 0.7, "ms"),
            costs("G3", "CPU a request", value(through, REQUEST_32.name, "cpu_us"), 350, "µs"),
            costs("G3", "CPU a stream of 16", value(through, STREAM_32.name, "cpu_us"), 1200, "µs"),
            faster("G3", "requests/s at 32", REQUEST_32.name, "triton", 0.5, through),
        ]
    if through in middle and GRPC_1 in middle[through]:
        found += [
            costs("G4", "added p50", added(rounds, through, "triton", GRPC_1, "p50_ms"), 0.9, "ms"),
            faster("G4", "requests/s at 32", GRPC_32, "triton", 0.4, through),
        ]
    if "ours" in middle:
        found += [
            costs("G5", "cache hit, p50", value("ours", HIT_1.name, "p50_ms"), 0.4, "ms"),
            Bar("G5", "cache hits/s of a worker", value("ours", HIT_32.name, "per_s"), 6000, False, "/s"),
        ]
    if growth:
        first, last = (growth["points"][i]["requests"] for i in (growth["mark"], -1))
        at_first, at_last = (growth["points"][i]["pss"] for i in (growth["mark"], -1))
        found += [
            costs("G5", f"memory after {first:,} requests", at_first, 80, "MB"),
            costs("G5", f"growth from there to {last:,}", round((at_last - at_first) / at_first, 4), FLAT, "× of it"),
        ]
    return found


def _over(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or not theirs else round(mine / theirs, 4)
