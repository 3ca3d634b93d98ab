"""Rate-limit headers: the IETF draft's RateLimit-Policy and RateLimit, and OpenAI's x-ratelimit-*.

draft-ietf-httpapi-ratelimit-headers-09; platform.openai.com/docs/guides/rate-limits. Concurrency has no such header.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from orchestrator.domain import Window

_LENGTHS_S = {"minute": 60, "hour": 3600, "day": 86400, "tokens_minute": 60, "tokens_day": 86400}
_COUNT_TOKENS = frozenset({"tokens_minute", "tokens_day"})
_REQUESTS, _TOKENS = (
    [f"x-ratelimit-{what}-{unit}".encode() for what in ("limit", "remaining", "reset")]
    for unit in ("requests", "tokens")
)
_FARTHEST = (math.inf, 0.0)


def limit_headers(windows: Sequence[Window], refused: str | None = None) -> list[tuple[bytes, bytes]]:
    """The headers of these windows; none where no window has any.

    RateLimit tells of the window nearest to exhaustion, x-ratelimit-* of the nearest one that counts requests and the
    nearest one that counts tokens. `t` and the resets never are too early. After a refusal RateLimit tells of the
    window `refused` instead, so that its `t` is not after Retry-After; it has no `t` (the draft lets it out) where
    that window has no header.
    """
    counted = []
    refusing = requests = tokens = None
    nearest_requests = nearest_tokens = _FARTHEST
    for window in windows:
        name, limit, used, reset_s = window
        if name not in _LENGTHS_S:
            continue
        counted.append((name, limit))
        nearness = ((limit - used) / limit if used < limit else 0.0, -reset_s)
        if name in _COUNT_TOKENS:
            if nearness < nearest_tokens:
                tokens, nearest_tokens = window, nearness
        elif nearness < nearest_requests:
            requests, nearest_requests = window, nearness
        if name == refused:
            refusing = window
    shown = refusing or (tokens if nearest_tokens < nearest_requests else requests)
    if shown is None:
        return []
    name, limit, used, reset_s = shown
    state = f'"{name.replace("_", "-")}";r={limit - used if used < limit else 0}'
    if refused is None or refusing is not None:
        state += f";t={math.ceil(reset_s)}"
    headers = [(b"ratelimit-policy", _policy(tuple(counted))), (b"ratelimit", state.encode())]
    if requests is not None:
        headers += _of_unit(_REQUESTS, requests)
    if tokens is not None:
        headers += _of_unit(_TOKENS, tokens)
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


def _of_unit(names: list[bytes], window: Window) -> list[tuple[bytes, bytes]]:
    _, limit, used, reset_s = window
    return [
        (names[0], b"%d" % limit),
        (names[1], b"%d" % (limit - used) if used < limit else b"0"),
        (names[2], duration(reset_s).encode()),
    ]


@lru_cache(maxsize=1024)
def _policy(limits: tuple[tuple[str, int], ...]) -> bytes:
    return ", ".join(f'"{name.replace("_", "-")}";q={limit};w={_LENGTHS_S[name]}' for name, limit in limits).encode()
