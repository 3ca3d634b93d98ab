"""Loading, reloading and unloading models of a running stack, without a failed request.

A version is verified before Triton hears of it. A new version comes up beside the old one, takes over in one step, and
the old one goes when what runs on it has ended; one that does not come up leaves the old one as it was. What is loaded
is noted in the model set of the home, by which the supervisor brings it back after a crash.

A stack of several servers is changed one server after the other, and a failure on one of them undoes the others: in
the end all serve the same.

A natively served encoder is two entries: its graph is loaded before it and unloaded after it, and while one version
follows another both have their graph.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator import models
from orchestrator.client import GatewayClient, GatewayError
from orchestrator.local import modelset, state
from orchestrator.models import Entry, Version
from orchestrator.ops import verification
from orchestrator.ops.modelserver import ControlError, ModelServer, Taken
from orchestrator.ops.verification import Advance
from orchestrator.settings import Settings
from orchestrator.triton.repository import ENGINE

POLL_S = 0.1
GATEWAY_S = 10.0


@dataclass(frozen=True)
class Outcome:
    """What a command has done. `before`: the version that was served until then. `changed`: whether anything was.

    `draining`: versions that still answer what had begun. `noticed`: every gateway process serves, or refuses, it now.
    """

    name: str
    version: int | None
    before: int | None
    changed: bool = True
    draining: tuple[int, ...] = ()
    noticed: bool = True


class Control:
    """The models of one running stack. `say` is told of each step, `advance` of the bytes that were verified.

    `timeout_s` bounds waiting for another operator, and each loading. What is not done raises ControlError, Busy or
    ModelsError. Raises ControlError at once where the stack uses servers of others.
    """

    def __init__(
        self, settings: Settings, found: state.State, timeout_s: float, say: Callable[[str], None] = lambda text: None,
        advance: Advance = lambda count: None,
    ) -> None:  # fmt: skip
        self._settings, self._found, self._timeout_s = settings, found, timeout_s
        self._home, self._say, self._advance = settings.home.resolve(), say, advance
        self._servers: list[ModelServer] = []
        if not found.tritons:
            raise ControlError(
                f"the stack of {settings.home} has no Triton of its own, it uses {found.triton_http}",
                f"an administrator changes what those serve: POST {found.ops}/v2/repository/models/NAME/load",
            )

    def load(self, name: str, number: int | None = None) -> Outcome:
        """Serve a version of a model that is not served yet. One that is served already is left as it is."""
        entry, version = self._chosen(name, number)
        with modelset.changing(self._home, name, self._timeout_s):
            return asyncio.run(self._load(entry, version, asked=number))

    def reload(self, name: str, number: int | None = None) -> Outcome:
        """Move a served model to another version, the newest unless one is named, or to a changed config.pbtxt."""
        entry, version = self._chosen(name, number)
        with modelset.changing(self._home, name, self._timeout_s):
            return asyncio.run(self._reload(entry, version))

    def unload(self, name: str) -> Outcome:
        """Stop serving a model. What runs on it may end for up to `drain_s` seconds."""
        for other, number in modelset.read(self._home).items():
            if self._engine_name(other, number) == name:
                raise ControlError(f"{name} is the graph of {other}, which is served", _of_graph("unload", other))
        with modelset.changing(self._home, name, self._timeout_s):
            return asyncio.run(self._unload(name))

    async def _load(self, entry: Entry, version: Version, asked: int | None) -> Outcome:
        async with self._connected():
            served = await self._served(entry.name)
            there = {number for number in served.values() if number is not None}
            if there:
                if asked is not None and there != {asked}:
                    raise ControlError(
                        f"{entry.name} is already served in version {max(there - {asked})}",
                        f"`truthgpt models reload {entry.name} --version {asked}` moves it to version {asked}",
                    )
                version = next((one for one in entry.versions if one.number == max(there)), version)
            lacking = [server for server in self._servers if served[server] is None]
            if not lacking:
                self._note(entry.name, max(there), models.engine_of(self._settings.model_repository, version))
                return Outcome(entry.name, max(there), max(there), changed=False)
            self._verify(entry, version)
            await self._bring_up(lacking, entry, version)
            for server in lacking:
                await server.trim(None, version)
            return Outcome(entry.name, version.number, None, noticed=await self._noticed(version))

    async def _reload(self, entry: Entry, version: Version) -> Outcome:
        name = entry.name
        async with self._connected():
            served = await self._served(name)
            former = max((number for number in served.values() if number is not None), default=None)
            if former is None:
                raise ControlError(f"{name} is not loaded", f"`truthgpt models load {name}` loads it")
            self._verify(entry, version)
            before = {server: server.processes(name) for server in self._servers}
            same = {server: server.processes(name, served[server]) for server in self._servers}
            await self._bring_up(self._servers, entry, version)
            if all(
                served[server] == version.number and same[server] == server.processes(name, version.number)
                for server in self._servers
            ):
                return Outcome(name, version.number, former, changed=False)
            noticed = await self._noticed(version)
            self._say(f"letting version {former} end what runs on it")
            left = await asyncio.gather(
                *(server.gone(name, version.number, self._settings.drain_s) for server in self._servers)
            )
            draining = set[int]()
            for server, numbers in zip(self._servers, left, strict=True):
                draining.update(server.without_stopped(name, before[server], numbers))
                await server.trim(self._engine_name(name, served[server]), version)
                server.sweep()
            return Outcome(name, version.number, former, draining=tuple(sorted(draining)), noticed=noticed)

    async def _unload(self, name: str) -> Outcome:
        async with self._connected():
            rows = {server: [row for row in await server.rows(name) if row.occupied] for server in self._servers}
            wanted = modelset.read(self._home)
            if not any(rows.values()) and name not in wanted:
                models.get(self._settings.model_repository, name)  # a name that nobody knows is an error
                return Outcome(name, None, None, changed=False)
            served = {
                server: max((int(row.version) for row in found if row.state == "READY"), default=None)
                for server, found in rows.items()
            }
            before = max((number for number in served.values() if number is not None), default=None)
            engine = self._engine_name(name, before or wanted.get(name))
            modelset.write(self._home, {k: v for k, v in wanted.items() if k not in (name, engine)})
            await self._refuse(name, served, wanted)
            draining = await self._ended(name)
            noticed = await self._settled(name, lambda row: row is None)
            if engine is not None:
                for server in self._servers:
                    await server.unload(engine)
                await self._ended(engine)
            for server in self._servers:
                server.sweep()
            return Outcome(name, None, before, draining=draining, noticed=noticed)

    async def _refuse(self, name: str, served: dict[ModelServer, int | None], wanted: dict[str, int]) -> None:
        """Have every server refuse what is new for a model, or none. Raises ControlError."""
        told: list[ModelServer] = []
        try:
            for server in self._servers:
                told.append(server)  # one that fails may do it all the same, later
                await server.unload(name)
        except BaseException:
            if len(self._servers) == 1:  # it may be unloaded all the same, and is not to come back
                raise
            modelset.write(self._home, wanted)
            with contextlib.suppress(models.ModelsError):  # it was removed while it was served
                entry = models.get(self._settings.model_repository, name)
                for server in told:
                    if served[server] is not None:
                        await server.undo(entry, Taken(served[server]), self._timeout_s)
            raise

    async def _ended(self, name: str) -> tuple[int, ...]:
        """Wait until an unloaded model has ended everywhere; the versions whose processes had to be ended."""
        left = await asyncio.gather(*(server.ended(name) for server in self._servers))
        return tuple(sorted({number for numbers in left for number in numbers}))

    def _chosen(self, name: str, number: int | None) -> tuple[Entry, Version]:
        """What is to be loaded. Raises ModelsError, or ControlError for a graph that belongs to another model."""
        entry = models.get(self._settings.model_repository, name)
        version = entry.newest if number is None else entry.version(number)
        if version.graph_only:
            message = f"{name} is the graph of another model and comes and goes with it"
            raise ControlError(message, _of_graph("load", name.removesuffix(ENGINE)))
        return entry, version

    def _engine_name(self, name: str, number: int | None) -> str | None:
        """The entry that has the graph of a version, as far as that can still be found out."""
        try:
            entry = models.get(self._settings.model_repository, name)
            engine = (entry.newest if number is None else entry.version(number)).engine
        except models.ModelsError:  # it was removed while it was served
            return name + ENGINE if name + ENGINE in modelset.read(self._home) else None
        return engine.name if engine is not None else None

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[None]:
        places, pids = self._found.tritons, self._found.processes
        several = len(places) > 1
        self._servers = [
            ModelServer(
                self._settings, place, pids.get(place.name), self._timeout_s,
                self._saying(place.name) if several else self._say,
            )
            for place in places
        ]  # fmt: skip
        try:
            yield
        finally:
            for server in self._servers:
                await server.close()

    def _saying(self, server: str) -> Callable[[str], None]:
        return lambda text: self._say(f"{server}: {text}")

    def _verify(self, entry: Entry, version: Version) -> None:
        """Raises ControlError when anything is wrong, before Triton has heard of it."""
        self._say(f"verifying {entry.name} version {version.number}")
        refused = verification.refusal(entry, version, self._advance)
        if refused is not None:
            raise ControlError(*refused)
        engine = models.engine_of(self._settings.model_repository, version)
        if engine is not None:
            self._verify(*engine)

    async def _bring_up(self, servers: Sequence[ModelServer], entry: Entry, version: Version) -> None:
        """Load a version on these servers, one after the other, or on none of them. Raises ControlError."""
        taken: list[tuple[ModelServer, Taken]] = []
        try:
            for server in servers:
                taken.append((server, await server.bring_up(entry, version)))
        except BaseException as error:
            left = [
                server.name for server, had in reversed(taken) if not await server.undo(entry, had, self._timeout_s)
            ]
            if left and isinstance(error, ControlError):
                hint = f"{', '.join(left)} could not be brought back, see `truthgpt models list`; {error.hint}"
                raise ControlError(str(error), hint) from error
            raise
        self._note(entry.name, version.number, models.engine_of(self._settings.model_repository, version))

    def _note(self, name: str, version: int, engine: tuple[Entry, Version] | None = None) -> None:
        wanted = modelset.read(self._home)
        former = self._engine_name(name, wanted.get(name))
        kept = {k: v for k, v in wanted.items() if k not in (name, former)}
        own = {engine[0].name: engine[1].number} if engine is not None else {}
        modelset.write(self._home, kept | own | {name: version})

    async def _served(self, name: str) -> dict[ModelServer, int | None]:
        """The version that new requests go to, on each server. Raises ControlError."""
        return {server: await server.served(name) for server in self._servers}

    async def _noticed(self, version: Version) -> bool:
        def serves(row: dict[str, Any] | None) -> bool:
            return row is not None and row.get("ready") is True and row.get("version") == str(version.number)

        return await self._settled(version.name, serves)

    async def _settled(self, name: str, holds: Callable[[dict[str, Any] | None], bool]) -> bool:
        """Wait until the gateway's row of a model is as it should be, in every worker; False when it is not in time.

        Any worker may answer, and each asks Triton once in an interval: it has to hold for so long.
        """
        settings = self._settings
        each_s = settings.heartbeat_interval_s + settings.heartbeat_timeout_s if settings.workers > 1 else 0.0
        since, deadline = math.inf, time.monotonic() + GATEWAY_S + each_s
        while time.monotonic() < deadline:
            try:
                rows = await asyncio.to_thread(GatewayClient(self._found.http, GATEWAY_S).health)
            except GatewayError:
                rows = {}
            given = rows.get("models")
            row = next((row for row in given or () if row.get("name") == name), None)
            if given is None or not holds(row):
                since = math.inf
            else:
                since = min(since, time.monotonic())
                if time.monotonic() - since >= each_s:
                    return True
            await asyncio.sleep(POLL_S)
        return False


def _of_graph(verb: str, model: str) -> str:
    return f"`truthgpt models {verb} {model}` does both"
