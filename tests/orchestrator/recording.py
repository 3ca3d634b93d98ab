"""Records to hand to sinks."""

from __future__ import annotations

import time
from typing import Any

from orchestrator.domain import Record


def record(**changes: Any) -> Record:
    """A request that went well, but for `changes`."""
    fields: dict[str, Any] = {
        "id": "id-1", "caller": "caller", "tenant": "tenant", "operation": "generate", "task": "text_generation",
        "model": "m", "stream": False, "outcome": "ok", "error": None, "finish_reason": "stop", "prompt_tokens": 3,
        "completion_tokens": 5, "accepted": time.time(), "ttft_s": 0.01, "duration_s": 0.02, "traceparent": None,
        "edge": "openai", "route": "POST /v1/completions",
    }  # fmt: skip
    return Record(**{**fields, **changes})
