"""Which request the running code works for: said by the edges, read by the log.

A task takes it along from whoever started it, so a line from inside a flight names the request that started the flight.
What serves all requests has to run outside of it: `create_task(..., context=contextvars.Context())`.
"""

from __future__ import annotations

from contextvars import ContextVar

# The request's id and its W3C traceparent, which is None where there is no trace.
handling: ContextVar[tuple[str, str | None] | None] = ContextVar("handling", default=None)
