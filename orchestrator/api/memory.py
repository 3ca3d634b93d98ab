"""Bodies that were parsed lately: one that comes again, as those do that the cache answers, is read only once."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from orchestrator.api.http import Exchange
from orchestrator.api.openai_request import Call
from orchestrator.domain import changed

ENTRIES = 512
BODY_BYTES = 4096  # of what is remembered: a longer one costs more to keep than to read


class Memory:
    """Calls by everything that they were made of."""

    def __init__(self) -> None:
        self._calls: OrderedDict[tuple[Any, ...], Call] = OrderedDict()

    def recall(self, key: tuple[Any, ...], exchange: Exchange) -> Call | None:
        """The call of these bytes, as this exchange's."""
        known = self._calls.get(key)
        if known is None:
            return None
        self._calls.move_to_end(key)
        own = changed(known.request, id=exchange.id, accepted_at=exchange.accepted_at, traceparent=exchange.traceparent)
        return Call((own,), known.include_usage)

    def keep(self, key: tuple[Any, ...], call: Call) -> None:
        """Remember a call of one request; the one that was used longest ago goes."""
        if len(call.requests) == 1:
            self._calls[key] = Call((changed(call.request, memo={}),), call.include_usage)
            if len(self._calls) > ENTRIES:
                self._calls.popitem(last=False)


def key_of(parser: object, body: bytes, exchange: Exchange) -> tuple[Any, ...] | None:
    """What a call is made of beside the settings; None for a body that is too long to remember."""
    if len(body) > BODY_BYTES:
        return None
    headers = exchange.headers
    return parser, body, headers.get(b"cache-control"), headers.get(b"x-truthgpt-task")
