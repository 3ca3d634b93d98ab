"""How many requests may be in flight. A reservation is one step: requests cannot all pass before one is counted."""

from __future__ import annotations

import asyncio

from orchestrator.errors import Draining, GatewayFull


class Permit:
    """One place among the requests in flight."""

    __slots__ = ("_admission",)

    def __init__(self, admission: Admission) -> None:
        self._admission: Admission | None = admission

    def release(self) -> None:
        """Give the place back; a second time does nothing."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._give_back()

    def __enter__(self) -> Permit:
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()


class Admission:
    """Counts the requests in flight in this process and refuses those over `limit`, or all once it is closed."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self.closed = False
        self._waiting: asyncio.Future[None] | None = None

    @property
    def full(self) -> bool:
        return self.in_flight >= self.limit

    def permit(self) -> Permit:
        """Take one place; leaving the context or `release()` gives it back.

        Raises Draining after `close()`, GatewayFull when every place is taken.
        """
        if self.closed:
            raise Draining
        if self.full:
            raise GatewayFull(self.limit)
        self.in_flight += 1
        return Permit(self)

    def _give_back(self) -> None:
        self.in_flight -= 1
        if self.in_flight == 0 and self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def close(self) -> None:
        self.closed = True

    async def idle(self) -> None:
        """Wait until nothing is in flight."""
        while self.in_flight:
            if self._waiting is None or self._waiting.done():
                self._waiting = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._waiting)
