"""Who is in the fleet: servers join as their names get addresses, and leave when what they run has ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Iterable
from contextvars import Context
from dataclasses import dataclass

from orchestrator.fleet.member import Member
from orchestrator.health import Health
from orchestrator.resolving import Entry, Resolver
from orchestrator.triton import Triton

log = logging.getLogger(__name__)

FOR_EVER_S = 3600.0  # there is nothing to look up


@dataclass(frozen=True)
class Times:
    """Seconds: between two heartbeats and two look-ups, what a step of an engine and the drain of a model may take, and
    the first rest of a server that failed.
    """

    interval_s: float = 0.25
    engine_stall_s: float = 10.0
    drain_s: float = 10.0
    resolve_s: float = 5.0
    eject_s: float = 1.0


@dataclass(frozen=True)
class Told:
    """Who is told what happens at a server: a model has turned ready, one is not served any more, or the server did not
    answer what was asked at a loop time.
    """

    ready: Callable[[str], None]
    gone: Callable[[str], None]
    failed: Callable[[Member, float, str], None]


class Roster:
    """The servers of these names; see Fleet. Must be made inside a running event loop."""

    def __init__(self, resolver: Resolver, connect: Callable[[str], Triton], times: Times, told: Told) -> None:
        self._resolver, self._connect, self._times, self._told = resolver, connect, times, told
        self._leaving: dict[str, Member] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._drained: Container[str] = frozenset()
        self._running = False
        self.members: tuple[Member, ...] = ()
        self._settle(resolver.servers)

    @property
    def everyone(self) -> tuple[Member, ...]:
        """Those included that are leaving."""
        return (*self.members, *self._leaving.values())

    @property
    def lookup_failures(self) -> int:
        return self._resolver.failures

    async def run(self) -> None:
        """Watch all servers, and look their names up, until cancelled."""
        self._running = True
        try:
            for member in self.members:
                self._watch(member)
            while True:
                if not self._resolver.fixed:
                    self._settle(await self._resolver.resolve())
                await asyncio.sleep(FOR_EVER_S if self._resolver.fixed else self._times.resolve_s)
        finally:
            self._running = False
            self._resolver.close()

    async def close(self) -> None:
        """Give every server up, with what runs there."""
        everyone, self.members, self._leaving = self.everyone, (), {}
        await asyncio.gather(*(member.close() for member in everyone), *self._closing)

    def drain(self, urls: Container[str]) -> None:
        """Nothing new is for the servers with these URLs, and something again for all others."""
        self._drained = urls
        for member in self.members:
            drained = member.url in urls
            if drained != member.drained:
                log.info("%s %s", member.url, "is drained" if drained else "takes requests again")
            member.drained = drained

    def _settle(self, servers: Iterable[Entry]) -> None:
        """Have exactly these servers."""
        before = {member.url: member for member in self.members}
        now: list[Member] = []
        for server in servers:
            member = before.pop(server.url, None) or self._leaving.pop(server.url, None) or self._joined(server.url)
            member.leaving, member.drained = False, member.url in self._drained
            now.append(member)
        self.members = tuple(now)
        for member in before.values():
            self._leave(member)

    def _joined(self, url: str) -> Member:
        times, told = self._times, self._told
        triton = self._connect(url)
        health = Health(
            triton, interval_s=times.interval_s, engine_stall_s=times.engine_stall_s, drain_s=times.drain_s,
            joins=self._running and bool(self.members),
        )  # fmt: skip
        member = Member(triton, health, times.eject_s, self._idle)
        health.on_ready.append(told.ready)
        health.on_gone.append(told.gone)
        health.on_lost.append(lambda asked_at, why: told.failed(member, asked_at, why))
        if self._running:
            log.info("%s has joined", url)
            self._watch(member)
        return member

    def _watch(self, member: Member) -> None:
        # outside of the context in which it joined
        member.task = asyncio.create_task(member.health.run(), name=f"watch {member.url}", context=Context())

    def _leave(self, member: Member) -> None:
        """No new request goes there, and what runs there may end."""
        log.info("%s has left: %d requests run on it", member.url, member.outstanding)
        member.leaving = True
        self._leaving[member.url] = member
        for served in member.health.served():
            self._told.gone(served.model.name)
        if not member.outstanding:
            self._idle(member)

    def _idle(self, member: Member) -> None:
        if self._leaving.get(member.url) is member:
            del self._leaving[member.url]
            task = asyncio.get_running_loop().create_task(member.close(), context=Context())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
