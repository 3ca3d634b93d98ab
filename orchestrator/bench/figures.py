"""The figures of a run. Times are seconds.

ttft_s       from sending a request to the first of its tokens
itl_s        between tokens: what passed between two moments at which some came, shared among those that came
tpot_s       a request's mean time per output token after the first: (last token - first token) / (tokens - 1)
latency_s    from sending a request to the end of its answer; in an open loop all count from when it was due
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.bench.answers import Answer, Fault
from orchestrator.bench.plan import Goals, Load
from orchestrator.bench.prompts import Sizing

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
MAX_VALUES = 2_000_000  # of one figure that are kept
MAX_KINDS = 50  # of errors that are told apart
OTHER = "other"


class Sample:
    """Values of one figure. Of more than MAX_VALUES every second one is kept, then every fourth, and so on."""

    def __init__(self) -> None:
        self.values = array("d")
        self._every = 1
        self._seen = 0

    def add(self, value: float, times: float = 1.0) -> None:
        """The same value so many times."""
        for _ in range(max(1, round(times))):
            if self._seen % self._every == 0:
                self.values.append(value)
                if len(self.values) >= MAX_VALUES:
                    self.values, self._every = self.values[::2], 2 * self._every
            self._seen += 1

    def to_json(self) -> dict[str, float] | None:
        """Percentiles, mean, least and greatest; None where there is no value."""
        if not self.values:
            return None
        ordered = sorted(self.values)
        found = {name: percentile(ordered, share) for name, share in PERCENTILES.items()}
        found |= {"mean": math.fsum(ordered) / len(ordered), "min": ordered[0], "max": ordered[-1]}
        return {name: round(value, 7) for name, value in found.items()}


def percentile(ordered: list[float], share: float) -> float:
    """Of ascending values, between two of them on the straight line, as numpy has it."""
    place = (len(ordered) - 1) * share
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass
class Run:
    """What one load made of one target. `sizing` says how long its prompts were made.

    `seconds` from the first request to the last answer; `cpu_s` of this process in that time. `counted`: the tokens are
    the server's count, not the number of pieces.
    """

    load: Load
    sizing: Sizing | None = None
    seconds: float = 0.0
    cpu_s: float = 0.0
    completed: int = 0
    good: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    counted: bool = True
    interrupted: bool = False
    gave_up: bool = False  # for nothing was answered any more
    ttft: Sample = field(default_factory=Sample)
    itl: Sample = field(default_factory=Sample)
    tpot: Sample = field(default_factory=Sample)
    latency: Sample = field(default_factory=Sample)
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)  # kind -> how many, and what the first one said

    def took(self, answer: Answer, due: float) -> None:
        """A good answer to what was to be sent at `due`."""
        latency, ttft = answer.ended - due, answer.first - due
        self.completed += 1
        self.output_tokens += answer.tokens
        self.prompt_tokens += answer.prompt_tokens or 0
        self.latency.add(latency)
        self.ttft.add(ttft)
        tpot = None
        if answer.asked:
            self.counted &= answer.counted is not None
            for gap, came in answer.gaps:
                self.itl.add(gap / max(came, 1.0), came)
            if answer.tokens > 1 and answer.last > answer.first:
                tpot = (answer.last - answer.first) / (answer.tokens - 1)
                self.tpot.add(tpot)
        self.good += meets(self.load.goals, ttft, tpot, latency)

    def failed(self, fault: Fault) -> None:
        kind = fault.kind if fault.kind in self.errors or len(self.errors) < MAX_KINDS else OTHER
        count, first = self.errors.get(kind, (0, str(fault)))
        self.errors[kind] = count + 1, first

    @property
    def error_count(self) -> int:
        return sum(count for count, _ in self.errors.values())

    @property
    def cpu_share(self) -> float:
        """Of one processor: near 1 the generator itself is the bottleneck."""
        return self.cpu_s / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """One element of `runs` of `truthgpt bench --json`."""
        done = self.completed + self.error_count

        def per_s(count: float) -> float:
            return round(count / self.seconds, 4) if self.seconds else 0.0

        return {
            "concurrency": self.load.concurrency,
            "rate": self.load.rate,
            "output_tokens_per_s": per_s(self.output_tokens),
            "requests_per_s": per_s(self.completed),
            "errors": self.error_count,
            "ttft_s": self.ttft.to_json(),
            "itl_s": self.itl.to_json(),
            "tpot_s": self.tpot.to_json(),
            "latency_s": self.latency.to_json(),
            "completed": self.completed,
            "goodput_per_s": per_s(self.good) if self.load.goals else None,
            "output_tokens": self.output_tokens,
            "output_tokens_mean": round(self.output_tokens / self.completed, 3) if self.completed else None,
            "prompt_tokens_mean": round(self.prompt_tokens / self.completed, 3) if self.completed else None,
            "tokens_counted_by": "server" if self.counted else "pieces",
            "error_kinds": {kind: {"count": count, "first": first} for kind, (count, first) in self.errors.items()},
            "seconds": round(self.seconds, 4),
            "interrupted": self.interrupted,
            "gave_up": self.gave_up,
            "client_cpu": round(self.cpu_share, 4),
            "client_cpu_us_per_request": round(1e6 * self.cpu_s / done, 1) if done else None,
            "load": self.load.to_json(),
        }


def meets(goals: Goals, ttft_s: float, tpot_s: float | None, latency_s: float) -> bool:
    """Whether a request is as its users expect it. One of a single token has no time between tokens."""
    given: Mapping[str, float | None] = {"ttft_s": ttft_s, "itl_s": tpot_s, "latency_s": latency_s}
    return all((value := given[name]) is None or value <= bound for name, bound in goals.to_json().items())
