"""Rate-limit headers: the IETF draft's RateLimit-Policy and RateLimit, and OpenAI's x-ratelimit-*."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.domain import Window


def limit_headers(windows: Sequence[Window]) -> list[tuple[bytes, bytes]]:
    """The headers of these windows; none without a window."""
    return []
