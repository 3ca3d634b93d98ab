"""What a request's Notes look like as response headers, on success and on refusal alike."""

from __future__ import annotations

from orchestrator.api.ratelimit import limit_headers
from orchestrator.domain import Notes


def note_headers(notes: Notes) -> list[tuple[bytes, bytes]]:
    """X-Cache, X-TruthGPT-Fallback, X-TruthGPT-Sanitized, X-TruthGPT-Limit-Shadow and the rate-limit headers."""
    headers = limit_headers(notes.windows, notes.refused)
    if notes.shadow:
        headers.append((b"x-truthgpt-limit-shadow", notes.shadow.replace("_", "-").encode()))
    if notes.cache:
        headers.append((b"x-cache", notes.cache.encode()))
    if notes.fallback:
        headers.append((b"x-truthgpt-fallback", notes.fallback.encode()))
    if notes.sanitized:
        headers.append((b"x-truthgpt-sanitized", ", ".join(notes.sanitized).encode()))
    return headers
