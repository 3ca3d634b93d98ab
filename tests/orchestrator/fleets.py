"""Fleets over fake Tritons, for tests: with short intervals, and running for as long as the context lasts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from orchestrator.fleet import Fleet, Times
from orchestrator.resolving import LookUp, Resolver, entries
from orchestrator.triton import Deadlines, Triton

from .conftest import until
from .fake_triton import FakeTriton

DEADLINES = Deadlines(connect_s=0.5, heartbeat_s=2.0, stall_s=2.0)
TIMES = Times(interval_s=0.03, engine_stall_s=5.0, drain_s=1.0, resolve_s=0.03, eject_s=0.3)


def fleet_of(
    *urls: str, deadlines: Deadlines = DEADLINES, look_up: LookUp | None = None, affinity: str = "auto",
    **times: float,
) -> Fleet:  # fmt: skip
    """One that does not run yet."""
    resolver = Resolver(entries(",".join(urls)), look_up, deadline_s=0.2)
    return Fleet(resolver, lambda url: Triton(url, deadlines), replace(TIMES, **times), affinity)


@asynccontextmanager
async def running(fleet: Fleet, ready: int | None = None) -> AsyncIterator[Fleet]:
    """Once this many servers, all by default, have a model that is ready."""
    task = asyncio.create_task(fleet.run())
    try:
        wanted = len(fleet.members) if ready is None else ready
        await until(lambda: sum(state.state == "ready" for state in fleet.states()) >= wanted)
        yield fleet
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await fleet.close()


@asynccontextmanager
async def fakes(count: int) -> AsyncIterator[list[FakeTriton]]:
    """Some fake Tritons."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(FakeTriton()) for _ in range(count)]
