"""What is measured of a candidate, under which load, and what it may not exceed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from orchestrator.ops.tune.errors import CandidateError, TuneError

MAX_S = 3600.0


@dataclass(frozen=True)
class Workload:
    """So many clients, each asking again when it has its answer; tokens of a prompt and of its answer.

    `output_tokens` is 0 for an encoder.
    """

    concurrency: int
    prompt_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        answers = f", {self.output_tokens} output tokens" if self.output_tokens else ""
        return f"{self.concurrency} clients, {self.prompt_tokens} prompt tokens{answers}"


@dataclass(frozen=True)
class Figures:
    """Throughput in output tokens a second, an encoder's in requests a second, and the 99th percentiles in seconds.

    An encoder has no time to first token and no inter-token latency. `requests` were answered, `rate` of them a second.
    """

    throughput: float
    latency_s: float
    ttft_s: float | None = None
    itl_s: float | None = None
    requests: int = 0
    rate: float = 0.0

    @classmethod
    def of(cls, run: Mapping[str, Any], encodes: bool) -> Figures:
        """Of one run of `bench`. Raises CandidateError when requests failed, or none was answered."""
        errors, requests = int(run["errors"]), int(run.get("completed") or 0)
        if errors:
            raise CandidateError(f"{errors} requests failed{_first_error(run)}")
        rate = float(run["requests_per_s"] or 0.0)
        throughput = rate if encodes else float(run["output_tokens_per_s"] or 0.0)
        latency = _p99(run, "latency_s")
        if not throughput or latency is None:
            raise CandidateError("no request was answered")
        if encodes:
            return cls(throughput, latency, requests=requests, rate=rate)
        return cls(throughput, latency, _p99(run, "ttft_s"), _p99(run, "itl_s"), requests, rate)

    def scaled(self, factor: float) -> Figures:
        """As they would be on a machine so many times as fast."""
        ttft_s, itl_s = (None if value is None else value / factor for value in (self.ttft_s, self.itl_s))
        throughput, rate = self.throughput * factor, self.rate * factor
        return Figures(throughput, self.latency_s / factor, ttft_s, itl_s, self.requests, rate)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Figures:
        """Raises KeyError, TypeError or ValueError for what is none."""
        numbers = [found[name] for name in ("throughput", "latency_s")]
        numbers += [value for name in ("ttft_s", "itl_s") if (value := found.get(name)) is not None]
        if any(isinstance(value, bool) or not math.isfinite(value) or value < 0 for value in numbers):
            raise ValueError("a figure is no number")
        return cls(**{one.name: found[one.name] for one in fields(cls) if one.name in found})


@dataclass(frozen=True)
class Bounds:
    """What the 99th percentiles may be at most, in seconds; None bounds nothing."""

    latency_s: float | None = None
    ttft_s: float | None = None
    itl_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> Bounds:
        """Of `ttft:0.5,itl:0.05,latency:5`. Raises TuneError that names the part and its limit."""
        found: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition(":")
            field = f"{name.strip()}_s"
            try:
                seconds = float(value)
            except ValueError:
                seconds = math.nan
            if field not in {one.name for one in fields(cls)} or field in found or not 0 < seconds <= MAX_S:
                raise TuneError(
                    f"bound: {part.strip()!r} is not one of ttft, itl, latency with seconds from above 0 to {MAX_S:g}",
                    "give one such as ttft:0.5,itl:0.05,latency:5",
                )
            found[field] = seconds
        return cls(**found)

    @classmethod
    def around(cls, figures: Figures, factor: float) -> Bounds:
        """No worse than so many times what was measured."""
        return cls(**{one.name: None if (value := getattr(figures, one.name)) is None else value * factor
                      for one in fields(cls)})  # fmt: skip

    def scaled(self, factor: float) -> Bounds:
        return Bounds(**{one.name: None if (value := getattr(self, one.name)) is None else value * factor
                         for one in fields(self)})  # fmt: skip

    def violations(self, figures: Figures) -> dict[str, float]:
        """For each bound, how much of itself it is exceeded by; 0 or less where it is kept."""
        found = {}
        for one in fields(self):
            bound, value = getattr(self, one.name), getattr(figures, one.name)
            if bound is not None and value is not None:
                found[one.name] = value / bound - 1 if bound else (1.0 if value else 0.0)
        return found

    def kept(self, figures: Figures) -> bool:
        return all(excess <= 0 for excess in self.violations(figures).values())

    def to_json(self) -> dict[str, float]:
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name.removesuffix('_s')} {value:.3g} s" for name, value in self.to_json().items())


def _first_error(run: Mapping[str, Any]) -> str:
    """The first message of the first kind, for people."""
    for messages in dict(run.get("error_kinds") or {}).values():
        said = messages.get("first") if isinstance(messages, Mapping) else messages
        return f": {said}"
    return ""


def _p99(run: Mapping[str, Any], name: str) -> float | None:
    given = run.get(name)
    value = given.get("p99") if isinstance(given, Mapping) else None
    return None if value is None else float(value)
