"""How many requests may be in flight. A reservation is one step: requests cannot all pass before one is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.errors import Draining, GatewayFull


class Admission:
    """Counts the requests in flight in this process and refuses those over `limit`, or all once it is closed."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self.closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def full(self) -> bool:
        return self.in_flight >= self.limit

    @contextmanager
    def permit(self) -> Iterator[None]:
        """Hold one place. Raises Draining after `close()`, GatewayFull when every place is taken."""
        if self.closed:
            raise Draining
        if self.full:
            raise GatewayFull(self.limit)
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self._idle.set()

    def close(self) -> None:
        self.closed = True

    async def idle(self) -> None:
        """Wait until nothing is in flight."""
        await self._idle.wait()
