"""How long a call to Triton may take, and the tie by which a model's health ends its streams at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from orchestrator.errors import TruthGPTError
from orchestrator.triton.connection import Answer

_T = TypeVar("_T")


@dataclass(frozen=True)
class Deadlines:
    """Seconds. `stall_s`: a silent stream is dead; the others bound the first token, the next one and the whole."""

    connect_s: float = 1.0
    stall_s: float = 1.5
    token_gap_s: float = 30.0
    first_token_s: float = 120.0
    request_s: float = 600.0
    heartbeat_s: float = 1.0


class Attendance:
    """One stream's tie to its model: `fail()` ends the stream at once, wherever it waits, with the given error.

    `tells_cached` is what that model does, as in domain.Abilities.
    """

    def __init__(self, tells_cached: bool = False) -> None:
        self.tells_cached = tells_cached
        self.error: TruthGPTError | None = None
        self._heard_at = 0.0
        self._timer: asyncio.Timeout | None = None
        self._answer: Answer | None = None

    @property
    def heard_at(self) -> float:
        """Loop time of the last bytes: a stream that is being written to proves the stub alive."""
        return max(self._heard_at, 0.0 if self._answer is None else self._answer.heard_at)

    @heard_at.setter
    def heard_at(self, at: float) -> None:
        self._heard_at = at

    def follow(self, answer: Answer) -> None:
        """Tie an answer that is being received to it. Raises what `fail()` was given before."""
        self._raise()
        self._answer = answer

    def fail(self, error: TruthGPTError) -> None:
        self.error = self.error or error
        if self._answer is not None:
            self._answer.fail(self.error)
        if self._timer is not None and not self._timer.expired():
            self._timer.reschedule(asyncio.get_running_loop().time())

    async def wait(self, call: Callable[[], Awaitable[_T]], until: float) -> _T:
        """Await `call()` until a loop time. Raises TimeoutError then, or at once what `fail()` is given."""
        self._raise()
        try:
            async with asyncio.timeout_at(until) as self._timer:
                result = await call()
        except TimeoutError:
            self._raise()
            raise
        finally:
            self._timer = None
        self.heard_at = asyncio.get_running_loop().time()
        return result

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error
