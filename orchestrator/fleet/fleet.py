"""Several Triton servers as one: what they serve together, who of them answers a request, and who joins and leaves.

A server is what health.py watches, one by one; here is only what is between them. With one server everything is as
that one says, and costs next to nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Container, Sequence
from typing import Any

from orchestrator import balance
from orchestrator.balance import affine, least, newest
from orchestrator.domain import GenerateRequest, Model, changed
from orchestrator.errors import ModelNotFound, TruthGPTError, UpstreamUnavailable
from orchestrator.fleet.member import Member, ServerState, Visit
from orchestrator.fleet.roster import Roster, Times, Told
from orchestrator.fleet.together import together
from orchestrator.health import Served
from orchestrator.resolving import Resolver
from orchestrator.triton import Triton

log = logging.getLogger(__name__)


class Fleet:
    """All servers. `connect` makes the client of one; `affinity` is auto, on or off (`prefix_affinity`).

    Must be made inside a running event loop; `run()` it, and `close()` it when done.
    """

    def __init__(
        self, resolver: Resolver, connect: Callable[[str], Triton], times: Times, affinity: str = "auto"
    ) -> None:  # fmt: skip
        self._affinity = affinity
        self.failovers = 0  # requests that another server took over
        self.on_ready: list[Callable[[str], None]] = []  # called with the name of a model that is ready at one more
        self.on_gone: list[Callable[[str], None]] = []  # and of one that none serves any more
        self._roster = Roster(resolver, connect, times, Told(self._ready, self._gone, self._failed))

    @property
    def members(self) -> tuple[Member, ...]:
        """Those that may be asked, drained ones among them, and not those that are leaving."""
        return self._roster.members

    async def run(self) -> None:
        """Watch all servers, and look their names up, until cancelled."""
        await self._roster.run()

    async def close(self) -> None:
        """Give every server up, with what runs there."""
        await self._roster.close()

    # what is served

    @property
    def triton_up(self) -> bool:
        """Whether any server answers."""
        return any(member.health.triton_up for member in self.members)

    @property
    def ready(self) -> bool:
        """A server is up, and each model that was judged anywhere is ready at a server that may be asked."""
        if (sole := self._sole()) is not None:
            return sole.health.ready
        rows = [(member, served) for member in self.members for served in member.health.served()]
        ready = {s.model.name for m, s in rows if s.model.ready and m.health.triton_up and not m.drained}
        return bool(ready) and all(served.model.name in ready for _, served in rows if served.judged)

    @property
    def lookup_failures(self) -> int:
        """How often a name could not be looked up."""
        return self._roster.lookup_failures

    def states(self) -> list[ServerState]:
        """Every server, those included that are leaving."""
        return [member.state() for member in self._roster.everyone]

    def served(self) -> list[Served]:
        """Every served model by name, as all servers together serve it."""
        if (sole := self._sole()) is not None:
            return sole.health.served()
        return [together(self._model(name), self._rows(name)) for name in self._names()]

    def serves(self, name: str) -> bool:
        """Whether a model of this name is served anywhere, ready or not."""
        return any(member.health.serves(name) for member in self.members)

    async def find(self, name: str) -> Model:
        """A model that is served, ready or not. Raises ModelNotFound.

        While every server is away, one that was never seen is taken to exist: nobody can say that it does not.
        """
        if (sole := self._sole()) is not None:
            return await sole.health.find(name)
        if not self.serves(name):
            asked = (member.health.find(name) for member in self.members)
            found = await asyncio.gather(*asked, return_exceptions=True)
            if not self.serves(name):
                if any(isinstance(one, ModelNotFound) for one in found):
                    raise ModelNotFound(name)
                return Model(name, "", 0, ready=False, chat=True)
        return self._model(name)

    def require(self, name: str) -> Model:
        """A model that has been seen, ready or not: of several versions the one that most servers have ready. Raises
        UpstreamUnavailable.
        """
        if (sole := self._sole()) is not None:
            return sole.health.require(name).model
        if not self.serves(name):
            raise UpstreamUnavailable(f"{name} is gone" if self.triton_up else "no Triton server answers")
        return self._model(name)

    async def renew(self, known: Model) -> Model:
        """Read anew what is served in place of this model, of which another version has answered. Raises
        UpstreamUnavailable.
        """
        if (sole := self._sole()) is not None:
            return await sole.health.renew(known)
        asked = (member.health.renew(served.model) for member, served in self._rows(known.name) if served.model.ready)
        for raised in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(raised, BaseException) and not isinstance(raised, TruthGPTError):
                raise raised
        return self.require(known.name)

    def fail_all(self, error: TruthGPTError) -> None:
        """End every running stream with this error."""
        for member in self._roster.everyone:
            member.health.fail_all(error)

    # who answers

    def attend(
        self, name: str, version: str = "", key: bytes | None = None, tried: list[Member] | None = None
    ) -> Visit:
        """Send a request for this model to a server, for as long as the context lasts. Raises UpstreamUnavailable.

        Servers that have this version come first; those that were tried already come last, and the one that is taken is
        added to them. Requests with the same key go to the same server while it can take them.
        """
        member = self._sole() or self._choose(name, version, key, tried or ())
        visit = Visit(member, member.health.attend(name), self._failed)
        if tried is not None:
            tried.append(member)
        return visit

    def another(self, name: str, tried: Collection[Member]) -> bool:
        """Whether a server could answer that was not tried."""
        members = self.members
        return len(members) > 1 and any(m not in tried and m.takes(name) and not m.resting for m in members)

    def key(self, request: GenerateRequest) -> bytes | None:
        """By what the request's server is chosen, None where any is as good."""
        if len(self.members) < 2 or self._affinity == "off":
            return None
        if self._affinity == "auto" and not self._model(request.model).prefix_reuse:
            return None
        return balance.prefix_of(request)

    async def describe(self, model: str, version: str, what: str) -> Any:
        """Triton's JSON about a model, of a server that serves it, see infer.describe(); no model: of any server."""
        tried: list[Member] = []
        while True:
            member = self._teller(model, version, tried)
            tried.append(member)
            try:
                return await member.triton.describe(model, version, what)
            except UpstreamUnavailable:
                if len(tried) >= len(self.members):
                    raise

    def _teller(self, model: str, version: str, tried: Sequence[Member]) -> Member:
        rest = [member for member in self.members if member not in tried]
        if not rest:
            raise UpstreamUnavailable("no Triton server is known")
        up = [member for member in rest if (member.takes(model) if model else member.health.triton_up)] or rest
        return least(_of_version(up, model, version or self._model(model).version))

    def _choose(self, name: str, version: str, key: bytes | None, tried: Collection[Member]) -> Member:
        ready = [member for member in self.members if member.takes(name)]
        if not ready:
            raise UpstreamUnavailable(f"{name} is not ready: {self._why(name)}")
        if tried:
            ready = [member for member in ready if member not in tried] or ready
        pool = _of_version([member for member in ready if not member.resting] or ready, name, version)
        return least(pool) if key is None else affine(key, pool)

    def _why(self, name: str) -> str:
        if not self.members:
            return "no Triton server is known"
        reasons = (f"{m.url} {'is drained' if m.drained else s.detail}" for m, s in self._rows(name))
        return "; ".join(reasons) or "no Triton server has it"

    def _sole(self) -> Member | None:
        """The only server, where there is one and it takes requests."""
        members = self.members
        return members[0] if len(members) == 1 and not members[0].drained else None

    def _rows(self, name: str) -> list[tuple[Member, Served]]:
        """The servers that serve a model, ready or not, and how it is there."""
        return [(m, served) for m in self.members if (served := m.health.known(name)) is not None]

    def _model(self, name: str) -> Model:
        """What all servers together serve under a name; one that was never seen where none does."""
        rows = self._rows(name)
        usable = [(member, s.model) for member, s in rows if s.model.ready and not member.drained]
        usable = [row for row in usable if not row[0].resting] or usable
        if not usable:
            return changed(rows[0][1].model, ready=False) if rows else Model(name, "", 0, ready=False, chat=True)
        first = usable[0][1]
        if all(model.version == first.version for _, model in usable):
            return first
        version = newest(model.version for _, model in usable)
        return next(model for _, model in usable if model.version == version)

    def _names(self) -> list[str]:
        return sorted({served.model.name for member in self.members for served in member.health.served()})

    def drain(self, urls: Container[str]) -> None:
        """Send nothing new to the servers with these URLs, and again to all others."""
        self._roster.drain(urls)

    def _failed(self, member: Member, began: float, why: str) -> None:
        """The server itself failed; with no other there is nobody to take its place."""
        if len(self.members) > 1 and not member.leaving and member.fail(began):
            log.warning("%s rests for %.3g s: %s", member.url, member.ejection.rest_s, why)

    def _ready(self, name: str) -> None:
        for call in self.on_ready:
            call(name)

    def _gone(self, name: str) -> None:
        if not self.serves(name):
            for call in self.on_gone:
                call(name)


def _of_version(members: list[Member], name: str, version: str) -> list[Member]:
    """Those that have this version of a model, all where none has."""
    if not version:
        return members
    has = [m for m in members if (served := m.health.known(name)) is not None and served.model.version == version]
    return has or members
