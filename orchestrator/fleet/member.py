"""One Triton server of the fleet, and one request's stay at it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.balance import Ejection
from orchestrator.errors import UpstreamUnavailable
from orchestrator.health import Attending, Health
from orchestrator.triton import Attendance, Triton

READY, EJECTED, DRAINING, DOWN = STATES = ("ready", "ejected", "draining", "down")


@dataclass(frozen=True)
class ServerState:
    """One server for people. `outstanding`: requests that it has from this process; `answered_s`: seconds since a
    heartbeat was asked that it answered, None where there was none yet.
    """

    url: str
    state: str  # of STATES
    outstanding: int
    answered_s: float | None


class Member:
    """A server: its client, its models' health, and whether it gets new requests.

    `drained`: an operator wants none on it. `leaving`: its name has other addresses now, and it goes once `outstanding`
    is 0; `on_idle` is called then.
    """

    def __init__(
        self, triton: Triton, health: Health, eject_s: float, on_idle: Callable[[Member], None]
    ) -> None:  # fmt: skip
        self.triton, self.health, self.on_idle = triton, health, on_idle
        self.url = triton.url
        self.outstanding = 0
        self.drained = self.leaving = False
        self.ejection = Ejection(eject_s)
        self.task: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def resting(self) -> bool:
        """Whether it failed, and has not come back yet."""
        ejection = self.ejection
        return ejection.until is not None and ejection.resting(self._loop.time(), self.health.answered_at)

    def fail(self, began: float) -> bool:
        """What was asked at this loop time failed, because of the server; whether a rest begins."""
        return self.ejection.fail(began, self._loop.time(), self.health.answered_at)

    def takes(self, model: str) -> bool:
        """Whether a request for this model may be sent to it: it is served here and answers."""
        served = self.health.known(model)
        return served is not None and served.model.ready and not self.drained

    def state(self) -> ServerState:
        health, now = self.health, self._loop.time()
        up = health.triton_up and any(served.model.ready for served in health.served())
        if self.drained or self.leaving:
            state = DRAINING
        else:
            state = DOWN if not up else EJECTED if self.resting else READY
        answered_s = None if health.answered_at == -math.inf else round(max(0.0, now - health.answered_at), 3)
        return ServerState(self.url, state, self.outstanding, answered_s)

    async def close(self) -> None:
        """Watch it no more, and give its connections up."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        await self.triton.close()


class Visit:
    """The context in which a request is at a server: it counts there, and falls with the health of its model there.

    `on_failure` is told of an error that is the server's, with the loop time at which the visit began.
    """

    __slots__ = ("_attending", "_began", "_on_failure", "attendance", "member", "triton")

    def __init__(
        self, member: Member, attending: Attending, on_failure: Callable[[Member, float, str], None]
    ) -> None:  # fmt: skip
        self.member, self.triton, self._attending, self._on_failure = member, member.triton, attending, on_failure
        self.attendance: Attendance
        self._began = asyncio.get_running_loop().time()

    def __enter__(self) -> Visit:
        self.member.outstanding += 1
        self.attendance = self._attending.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._attending.__exit__(kind, error, trace)
        member = self.member
        member.outstanding -= 1
        if isinstance(error, UpstreamUnavailable) and error.server:
            self._on_failure(member, self._began, str(error))
        if member.leaving and not member.outstanding:
            member.on_idle(member)
