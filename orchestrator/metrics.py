"""What one process counts of its requests: a sink of their records. Where it is scraped, see scrape.py.

A request touches some fifteen series, so they are plain dicts and lists here; nothing is locked, because everything
happens on the loop. Counts only grow while the process lives; `snapshot` gives them all.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping

from orchestrator.domain import Record
from orchestrator.errors import CALLERS_FAULT as REFUSALS
from orchestrator.incident import Incident
from orchestrator.metrics_table import TABLE

log = logging.getLogger(__name__)

Labels = tuple[str, ...]
Reading = Callable[[], Mapping[Labels, float]]  # label values -> value, of one series
Snapshot = dict[str, list[list[str | float | list[float]]]]  # series -> rows of the label values and the value

TOGETHER = 32  # requests that are counted in one go: some 0.1 ms
UNKNOWN = "unknown"  # a model that is not served: clients may name what they like, and no series comes of it


class Counter:
    """A number for each combination of label values."""

    def __init__(self) -> None:
        self.values: dict[Labels, float] = {}

    def add(self, labels: Labels, by: float = 1) -> None:
        self.values[labels] = self.values.get(labels, 0) + by


class Histogram:
    """For each combination of label values: the observations in each bucket, those above all of them, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.values: dict[Labels, list[float]] = {}

    def observe(self, labels: Labels, value: float) -> None:
        cells = self.values.get(labels)
        if cells is None:
            cells = self.values[labels] = [0] * (len(self._bounds) + 2)
        cells[bisect_left(self._bounds, value)] += 1
        cells[-1] += value


class Metrics:
    """`serves` tells whether a model of this name is served; `readings` are the series that are read, not counted."""

    def __init__(self, serves: Callable[[str], bool]) -> None:
        self._serves = serves
        self._waiting: list[Record] = []
        self.readings: dict[str, Reading] = {}
        self._counted: dict[str, Counter | Histogram] = {}
        self._requests = self._counter("truthgpt_requests_total")
        self._errors = self._counter("truthgpt_errors_total")
        self._generations = self._counter("truthgpt_generations_total")
        self._tokens = self._counter("truthgpt_tokens_total")
        self._fallbacks = self._counter("truthgpt_fallbacks_total")
        self._upstream = self._counter("truthgpt_upstream_requests_total")
        self._cache = self._counter("truthgpt_cache_requests_total")
        self._limits = self._counter("truthgpt_limit_decisions_total")
        self._duration = self._histogram("truthgpt_request_duration_seconds")
        self._generation_duration = self._histogram("truthgpt_generation_duration_seconds")
        self._first_token = self._histogram("truthgpt_time_to_first_token_seconds")
        self._per_token = self._histogram("truthgpt_time_per_output_token_seconds")
        self._queue = self._histogram("truthgpt_queue_seconds")
        self._overhead = self._histogram("truthgpt_overhead_seconds")
        self._stage = self._histogram("truthgpt_stage_seconds")

    def record(self, record: Record) -> None:
        """A sink of the request path. Counting several in one go costs half as much: the processor has it at hand."""
        self._waiting.append(record)
        if len(self._waiting) >= TOGETHER:
            self._count()

    def _count(self) -> None:
        while self._waiting:
            self._add(self._waiting.pop())

    def _add(self, record: Record) -> None:
        model, endpoint, duration_s = self._model(record.model), record.operation, record.duration_s
        outcome = "refused" if record.error in REFUSALS else record.outcome
        self._requests.add((endpoint, record.edge, outcome))
        self._duration.observe((model, endpoint, outcome), duration_s)
        self._overhead.observe((endpoint,), duration_s - (record.upstream_s or 0.0))
        began_s = 0.0
        for stage, ended_s in record.stages:
            self._stage.observe((stage,), ended_s - began_s)
            began_s = ended_s
        if record.error is not None:
            self._errors.add((record.error,))
        if record.cache is not None:
            self._cache.add((record.task, record.cache))
        if record.limited:
            decision = "refused" if record.refused else "shadow" if record.shadow else "allowed"
            self._limits.add((endpoint, decision))
        if endpoint == "generate":
            self._generations.add((model, outcome))
            if outcome == "ok":
                self._generation_duration.observe((model,), duration_s)
            self._answer(record, model)
        elif endpoint in ("embed", "classify"):
            self._tokens.add((model, "cached" if record.cache == "hit" else "prompt"), record.prompt_tokens)

    def incident(self, incident: Incident) -> None:
        """What an edge refused before the path; an administrator's call that was let in is no error."""
        if incident.kind != "admin":
            self._errors.add((incident.kind,))

    def upstream(self, model: str, outcome: str) -> None:
        """One attempt at Triton has ended."""
        self._upstream.add((self._model(model), outcome))

    def snapshot(self) -> Snapshot:
        """Everything that was counted since the process began, and every reading as it is now."""
        self._count()
        shot: Snapshot = {
            name: [[*labels, value] for labels, value in counted.values.items()]
            for name, counted in self._counted.items()
        }
        for name, read in self.readings.items():
            try:
                shot[name] = [[*labels, float(value)] for labels, value in read().items()]
            except Exception:  # one that cannot be read leaves the others to be seen
                log.exception("%s cannot be read", name)
        return shot

    def _answer(self, record: Record, model: str) -> None:
        """What only the model that really answered can be measured by."""
        if record.fallback is not None:
            self._fallbacks.add((model,))
            kind, _, other = record.fallback.partition("=")
            if kind != "model":
                return
            model = self._model(other)
        if record.cache == "hit":
            self._tokens.add((model, "cached"), record.completion_tokens)
            return
        self._tokens.add((model, "prompt"), record.prompt_tokens)
        self._tokens.add((model, "completion"), record.completion_tokens)
        if record.queue_s is not None:
            self._queue.observe((model,), record.queue_s)
        if record.ttft_s is not None:
            self._first_token.observe((model,), record.ttft_s)
            if record.outcome == "ok" and record.completion_tokens > 1:
                following_s = max(0.0, record.duration_s - record.ttft_s)
                self._per_token.observe((model,), following_s / (record.completion_tokens - 1))

    def _model(self, name: str) -> str:
        return name if self._serves(name) else UNKNOWN

    def _counter(self, name: str) -> Counter:
        counter = self._counted[name] = Counter()
        return counter

    def _histogram(self, name: str) -> Histogram:
        histogram = self._counted[name] = Histogram(TABLE[name].buckets)
        return histogram
