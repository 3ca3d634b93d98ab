"""What the audit log says: a request, an incident, a minute, and a flood of which not every drop is written."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from json.encoder import encode_basestring_ascii as quoted
from operator import attrgetter

from orchestrator.auditlog import encode, stamp
from orchestrator.domain import Record
from orchestrator.errors import SUSPECT
from orchestrator.fingerprint import Fingerprint
from orchestrator.incident import Incident
from orchestrator.keys import subject_of
from orchestrator.masking import masked

EVENTS = ("generation", "error", "security", "performance", "lost", "recovered", "start", "stop")
SECURITY = SUSPECT | {"admin"}  # and what administrators do
TEXT_CHARS = 512  # of each field that a client has a say in

# The texts of an event that many have in common, beside the model's name; those that are empty are left out.
_COMMON = (
    "tenant", "operation", "edge", "route", "task", "outcome", "error", "finish_reason", "cache", "fallback", "refused",
    "shadow",
)  # fmt: skip
_common = attrgetter("model", *_COMMON)


def event_of(kind: str | None) -> str:
    """The event of an error's kind."""
    return "generation" if kind is None else "security" if kind in SECURITY else "error"


def of_request(record: Record, prints: Fingerprint) -> bytes:
    """`generation` where the request was answered or its client left, else `error` or `security`."""
    trace = record.trace
    traceparent = record.traceparent if trace is None else trace.own
    line = (  # the same as `encode` of a mapping, at a third of the cost
        f'"event":"{event_of(record.error)}","time":"{stamp(record.accepted + record.duration_s)}",'
        f'"id":{quoted(masked(record.id))},"caller":"{prints.caller(record.caller)}"{_common_json(*_common(record))},'
        f'"prompt_tokens":{record.prompt_tokens},"completion_tokens":{record.completion_tokens},'
        f'"output_chars":{record.output_chars},"duration_s":{record.duration_s:.6f}'
    )
    if record.input_hash:
        line += f',"input_hash":{quoted(record.input_hash)}'
    if record.ttft_s is not None:
        line += f',"ttft_s":{record.ttft_s:.6f}'
    if record.stream:
        line += ',"stream":true'
    if record.degraded:
        line += ',"degraded":true'
    if record.sanitized:
        line += f',"sanitized":{json.dumps(record.sanitized)}'
    if traceparent:
        line += f',"traceparent":"{traceparent}"'
    return line.encode("ascii")


@lru_cache(maxsize=1024)
def _common_json(model: str, *texts: str | None) -> str:
    named = zip(_COMMON, texts, strict=True)
    return f',"model":{quoted(masked(model))}' + "".join(f',"{name}":{quoted(masked(x))}' for name, x in named if x)


def of_incident(incident: Incident, prints: Fingerprint) -> bytes:
    """What was refused before the path, or done by an administrator. Addresses are hashed as callers are."""
    address = prints.caller(subject_of(incident.address)) if incident.address else ""
    fields = {
        "kind": incident.kind, "id": masked(incident.id), "edge": incident.edge, "operation": incident.operation,
        "caller": prints.caller(incident.caller), "address": address, "subject": prints.caller(incident.subject),
        "detail": incident.detail, "traceparent": incident.traceparent,
    }  # fmt: skip
    clipped = {name: value if value is None else value[:TEXT_CHARS] for name, value in fields.items()}
    return encode(event_of(incident.kind), incident.at, clipped)


class Flood:
    """How much of what costs a client nothing is written: of each kind `burst` lines, then `rate` lines a second.

    The rest is counted. `admits` is for one thread, `over` may be called in any.
    """

    def __init__(
        self, burst: float = 100, rate: float = 5, clock: Callable[[], float] = time.monotonic, kinds: int = 64
    ) -> None:
        self._burst, self._rate, self._clock, self._kinds = burst, rate, clock, kinds
        self._buckets: dict[str, tuple[float, float]] = {}  # kind -> lines that may be written, as of when
        self._over: dict[str, int] = {}

    def admits(self, kind: str) -> bool:
        """Whether one more of this kind is written."""
        if kind not in self._buckets and len(self._buckets) >= self._kinds:
            kind = "other"
        now = self._clock()
        left, at = self._buckets.get(kind, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._rate)
        if left < 1:
            self._buckets[kind] = left, now
            self._over[kind] = self._over.get(kind, 0) + 1
            return False
        self._buckets[kind] = left - 1, now
        return True

    def over(self) -> dict[str, int]:
        """How many of each kind were not written, since the beginning."""
        return dict(self._over)


_STEP = math.log(1.02)


class Quantiles:
    """Quantiles of positive numbers in constant memory, to within 1 %: counts in buckets that grow by 2 %."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, value: float) -> None:
        self._counts[round(math.log(value if value > 1e-9 else 1e-9) / _STEP)] += 1

    def at(self, *parts: float) -> dict[str, float] | None:
        """`{"p50": …}` for the part 0.5, by nearest rank; None where there is nothing."""
        count = self._counts.total()
        if not count:
            return None
        found, below = {}, 0
        wanted = {part: math.ceil(part * count) for part in parts}
        for bucket, number in sorted(self._counts.items()):
            below += number
            for part in [part for part, rank in wanted.items() if rank <= below]:
                found[f"p{part * 100:g}"] = float(f"{math.exp(bucket * _STEP):.3g}")
                del wanted[part]
        return found


class Minute:
    """What a worker did in some time. Not every request of a flood is in the quantiles, but all are counted."""

    def __init__(self, began: float) -> None:
        self.began = began
        self._outcomes: Counter[str] = Counter()
        self._tokens = 0
        self._duration, self._ttft = Quantiles(), Quantiles()

    def add(self, record: Record) -> None:
        self._outcomes[record.outcome] += 1
        self._tokens += record.completion_tokens
        self._duration.add(record.duration_s)
        if record.ttft_s is not None:
            self._ttft.add(record.ttft_s)

    def figures(self, now: float, unwritten: int) -> dict[str, object]:
        """What came to pass; empty for nothing. `unwritten`: failed requests that were only counted."""
        requests, seconds = self._outcomes.total() + unwritten, max(now - self.began, 1e-3)
        if not requests:
            return {}
        parts = (0.5, 0.95, 0.99)
        return {
            "seconds": round(seconds, 3), "requests": requests, "errors": self._outcomes["error"] + unwritten,
            "cancelled": self._outcomes["cancelled"], "completion_tokens": self._tokens,
            "tokens_per_s": round(self._tokens / seconds, 3), "duration_quantiles_s": self._duration.at(*parts),
            "ttft_quantiles_s": self._ttft.at(*parts),
        }  # fmt: skip
