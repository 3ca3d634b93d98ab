"""The rule of limits.py in this process's memory, for when Redis is away: same windows, same clock, same verdicts."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from orchestrator.domain import Limits, Window
from orchestrator.limits import LEASE_S, MOST, Reservation, Verdict, limit_rows, settled_windows

_BUCKETS = 61  # 60 of a window's length, and the one being filled
_HELD_MS = 60_000  # a clock that goes back by more had been wrong before
_MOST_COUNT = 4 * MOST
_LEASE_MS = int(LEASE_S * 1000)
_STEPS_MS = {"minute": 1_000, "hour": 60_000, "day": 1_440_000, "tokens_minute": 1_000, "tokens_day": 1_440_000}


class _Counts:
    """One window: the counts of at most 61 sub-buckets, oldest first; the last one has the number `head`."""

    def __init__(self, head: int) -> None:
        self.head = head
        self.counts: deque[int] = deque([0], maxlen=_BUCKETS)
        self.sum = 0

    def at(self, bucket: int) -> _Counts:
        """A copy that is brought forward to this sub-bucket; what is too old has dropped out."""
        new = _Counts(bucket)
        new.counts = deque(self.counts, maxlen=_BUCKETS)
        new.counts.extend([0] * min(bucket - self.head, _BUCKETS))
        new.sum = sum(new.counts)
        return new

    def change(self, at: int, count: int) -> None:
        count = min(max(count, 0), _MOST_COUNT)
        self.sum += count - self.counts[at]
        self.counts[at] = count

    def free_ms(self, step_ms: int, seen_ms: int, excess: int = 1) -> int:
        """Milliseconds from `seen_ms` until so much has left the window; 0 when it holds less."""
        freed = 0
        for age, count in zip(range(len(self.counts) - 1, -1, -1), self.counts, strict=True):
            freed += count
            if freed >= excess:
                return (self.head - age + _BUCKETS) * step_ms - seen_ms
        return 0


@dataclass
class _Endpoint:
    """A caller's windows at one endpoint and its clock, as limits_lua.py describes them."""

    born_ms: int
    last_ms: int
    offset_ms: int = 0
    windows: dict[str, _Counts] = field(default_factory=dict)

    def time(self, now_ms: int) -> int:
        if now_ms + self.offset_ms < self.last_ms - _HELD_MS:
            self.offset_ms = self.last_ms - now_ms
        return max(now_ms + self.offset_ms, self.last_ms)


@dataclass
class _Subject:
    endpoints: dict[str, _Endpoint] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)  # lease -> when it expires, in ms

    def running(self, now_ms: int, limit: int) -> int:
        """Live leases, after the expired ones were removed."""
        self.leases = {name: due for name, due in self.leases.items() if due > now_ms}
        if len(self.leases) >= limit:  # one from a clock that was ahead would not expire
            latest_ms = now_ms + _LEASE_MS + _HELD_MS
            self.leases = {name: due for name, due in self.leases.items() if due <= latest_ms}
        return len(self.leases)


class LocalLimits:
    """The callers that asked last, at most `max_subjects` of them; one who is dropped starts anew.

    Times are Unix seconds. What each process accepts is counted in that process alone.
    """

    def __init__(self, max_subjects: int = 10_000) -> None:
        self._subjects: OrderedDict[str, _Subject] = OrderedDict()
        self._max = max_subjects

    def reserve(
        self, subject: str, endpoint: str, limits: Limits, *, tokens: int, lease: str, enforce: bool, now: float
    ) -> Verdict:
        """Count one request and its tokens in every window, or in none, as `limits_reserve` does."""
        known = self._subject(subject)
        now_ms, tokens = round(now * 1000), min(tokens, MOST)
        place = known.endpoints.get(endpoint) or _Endpoint(now_ms, now_ms)
        time_ms = place.time(now_ms)
        seen_ms = now_ms + place.offset_ms
        rows = [(name, limit) for name, limit in limit_rows(limits) if limit > 0]
        refused, wait_ms = None, 0
        after: dict[str, _Counts] = {}
        for name, limit in rows:
            step_ms = _STEPS_MS.get(name)
            if step_ms is None:
                continue
            cost = tokens if name.startswith("tokens") else 1
            bucket = time_ms // step_ms
            window = after[name] = place.windows.get(name, _Counts(bucket)).at(bucket)
            excess = window.sum + cost - limit
            if excess > 0:
                free_ms = window.free_ms(step_ms, seen_ms, excess if cost <= limit else 1)
                if cost > limit:
                    free_ms = max(free_ms, 60 * step_ms)
                if free_ms > wait_ms:
                    refused, wait_ms = name, free_ms
        if (
            limits.concurrency > 0
            and known.running(now_ms, limits.concurrency) >= limits.concurrency
            and wait_ms < 1000
        ):
            refused, wait_ms = "concurrency", 1000
        accepted = refused is None or not enforce
        if accepted:
            for name, window in after.items():
                window.change(-1, window.counts[-1] + (tokens if name.startswith("tokens") else 1))
            if after:
                known.endpoints[endpoint] = place
                place.last_ms = time_ms
                place.windows.update(after)
            if limits.concurrency > 0:
                known.leases[lease] = now_ms + _LEASE_MS
        windows = []
        for name, limit in rows:
            if name in after:
                windows.append(
                    Window(name, limit, after[name].sum, after[name].free_ms(_STEPS_MS[name], seen_ms) / 1000)
                )
            else:
                windows.append(Window(name, limit, len(known.leases), 1.0 if known.leases else 0.0))
        return Verdict(
            accepted,
            tuple(windows),
            next((window for window in windows if window.name == refused), None),
            wait_ms / 1000,
            Reservation(place.born_ms, time_ms, tokens, settled_windows(limits) if accepted else 0),
        )

    def settle(self, subject: str, endpoint: str, verdict: Verdict, tokens: int, lease: str) -> None:
        """Put the tokens that were used in place of the reserved ones and give the lease back, as SETTLE does."""
        known = self._subjects.get(subject)
        if known is None:
            return
        born_ms, time_ms, reserved, used = verdict.reservation
        if used & 4:
            known.leases.pop(lease, None)
        place = known.endpoints.get(endpoint)
        if place is None or place.born_ms != born_ms:
            return
        for bit, name in ((1, "tokens_minute"), (2, "tokens_day")):
            window = place.windows.get(name)
            if used & bit and window is not None:
                at = time_ms // _STEPS_MS[name] - window.head - 1
                if -at <= len(window.counts):
                    window.change(at, window.counts[at] - reserved + min(tokens, MOST))

    def renew(self, subject: str, lease: str, now: float) -> None:
        """Keep the lease of a request that is still running; at least every RENEW_S seconds."""
        known = self._subjects.get(subject)
        if known is not None:
            known.leases[lease] = round(now * 1000) + _LEASE_MS

    def _subject(self, subject: str) -> _Subject:
        known = self._subjects.get(subject)
        if known is None:
            if len(self._subjects) >= self._max:
                self._subjects.popitem(last=False)
            known = self._subjects[subject] = _Subject()
        else:
            self._subjects.move_to_end(subject)
        return known
