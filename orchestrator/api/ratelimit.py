"""Rate-limit headers: the IETF draft's RateLimit-Policy and RateLimit, and OpenAI's x-ratelimit-*.

draft-ietf-httpapi-ratelimit-headers-09; platform.openai.com/docs/guides/rate-limits. Concurrency has no such header.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from orchestrator.domain import Window

_LENGTHS_S = {"minute": 60, "hour": 3600, "day": 86400, "tokens_minute": 60, "tokens_day": 86400}

_HEADERS = {
    unit: tuple(f"x-ratelimit-{what}-{unit}".encode() for what in ("limit", "remaining", "reset"))
    for unit in ("requests", "tokens")
}
_NEAREST, _FARTHEST = (-1.0, 0.0), (math.inf, 0.0)


def limit_headers(windows: Sequence[Window], refused: str | None = None) -> list[tuple[bytes, bytes]]:
    """The headers of these windows; none where no window has any.

    RateLimit tells of the window nearest to exhaustion, x-ratelimit-* of the nearest one that counts requests and the
    nearest one that counts tokens. `t` and the resets never are too early. After a refusal RateLimit tells of the
    window `refused` instead, so that its `t` is not after Retry-After; it has no `t` (the draft lets it out) where
    that window has no header.
    """
    counted, shown, nearest = [], None, _FARTHEST
    near: dict[str, tuple[tuple[float, float], Window]] = {}  # of each unit, the window nearest to exhaustion
    for window in windows:
        if window.name not in _LENGTHS_S:
            continue
        counted.append(window)
        nearness = (window.remaining / window.limit, -window.reset_s)
        unit = "tokens" if window.name.startswith("tokens") else "requests"
        if unit not in near or nearness < near[unit][0]:
            near[unit] = nearness, window
        if window.name == refused:
            shown, nearest = window, _NEAREST
        elif nearness < nearest:
            shown, nearest = window, nearness
    if shown is None:
        return []
    state = f'"{shown.name.replace("_", "-")}";r={shown.remaining}'
    if refused is None or refused == shown.name:
        state += f";t={math.ceil(shown.reset_s)}"
    headers = [
        (b"ratelimit-policy", _policy(tuple([(window.name, window.limit) for window in counted]))),
        (b"ratelimit", state.encode()),
    ]
    for unit, (limit, remaining, reset) in _HEADERS.items():
        if unit in near:
            window = near[unit][1]
            headers += (
                (limit, b"%d" % window.limit),
                (remaining, b"%d" % window.remaining),
                (reset, duration(window.reset_s).encode()),
            )
    return headers


def duration(seconds: float) -> str:
    """A duration as OpenAI writes it: 12ms, 1.5s, 6m0s, 1h2m3s; rounded up to milliseconds or seconds."""
    ms = math.ceil(seconds * 1000 - 1e-6)  # whole milliseconds stay what they are
    if ms <= 0:
        return "0s"
    if ms < 1000:
        return f"{ms}ms"
    if ms < 60_000:
        return f"{ms / 1000:g}s"
    minutes, left = divmod(-(-ms // 1000), 60)
    return f"{minutes}m{left}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60}m{left}s"


@lru_cache(maxsize=1024)
def _policy(limits: tuple[tuple[str, int], ...]) -> bytes:
    return ", ".join(f'"{name.replace("_", "-")}";q={limit};w={_LENGTHS_S[name]}' for name, limit in limits).encode()
