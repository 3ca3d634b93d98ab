"""Loading, reloading and unloading models of a running stack, without a failed request.

A version is verified before Triton hears of it. A new version comes up beside the old one, takes over in one step, and
the old one goes when what runs on it has ended; one that does not come up leaves the old one as it was. What is loaded
is noted in the model set of the home, by which the supervisor brings it back after a crash.

A natively served encoder is two entries: its graph is loaded before it and unloaded after it, and while one version
follows another both have their graph.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import psutil

from orchestrator import models
from orchestrator.client import GatewayClient, GatewayError
from orchestrator.errors import TruthGPTError, UpstreamError
from orchestrator.local import modelset, state, tritonserver
from orchestrator.local.process import runs
from orchestrator.models import Entry, Version
from orchestrator.ops import verification
from orchestrator.ops.verification import Advance
from orchestrator.settings import Settings
from orchestrator.triton import Deadlines, Repository, Row, Triton
from orchestrator.triton.repository import ENGINE

POLL_S = 0.1
GATEWAY_S = 10.0
CUT_OFF_S = 4.0  # what the gateway has told to end needs this long at most
UNDO_S = 10.0


class ControlError(Exception):
    """What was asked was not done; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


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

    `timeout_s` bounds waiting for another operator, and loading, each.
    """

    def __init__(
        self, settings: Settings, found: state.State, timeout_s: float, say: Callable[[str], None] = lambda text: None,
        advance: Advance = lambda count: None,
    ) -> None:  # fmt: skip
        self._settings, self._found, self._timeout_s = settings, found, timeout_s
        self._home, self._say, self._advance = settings.home.resolve(), say, advance
        self._triton: Triton
        self._repository: Repository

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
            if served is not None:
                if asked not in (None, served):
                    raise ControlError(
                        f"{entry.name} is already served in version {served}",
                        f"`truthgpt models reload {entry.name} --version {asked}` moves it to version {asked}",
                    )
                serving = next((one for one in entry.versions if one.number == served), version)
                self._note(entry.name, served, models.engine_of(self._settings.model_repository, serving))
                return Outcome(entry.name, served, served, changed=False)
            self._verify(entry, version)
            await self._bring_up(entry, version, None)
            await self._trim(None, version)
            return Outcome(entry.name, version.number, None, noticed=await self._noticed(version))

    async def _reload(self, entry: Entry, version: Version) -> Outcome:
        name = entry.name
        async with self._connected():
            served = await self._served(name)
            if served is None:
                raise ControlError(f"{name} is not loaded", f"`truthgpt models load {name}` loads it")
            self._verify(entry, version)
            before, same = self._processes(name), self._processes(name, served)
            await self._bring_up(entry, version, served)
            if served == version.number and same == self._processes(name, served):
                return Outcome(name, version.number, served, changed=False)
            noticed = await self._noticed(version)
            self._say(f"letting version {served} end what runs on it")
            draining = await self._gone(name, version.number, self._settings.drain_s)
            draining = self._without_stopped(name, before, draining)
            await self._trim(self._engine_name(name, served), version)
            tritonserver.sweep(self._found.shm_prefix, kill=False)
            return Outcome(name, version.number, served, draining=draining, noticed=noticed)

    async def _unload(self, name: str) -> Outcome:
        async with self._connected():
            rows = [row for row in await self._rows(name) if row.occupied]
            known = name in modelset.read(self._home)
            if not rows and not known:
                models.get(self._settings.model_repository, name)  # a name that nobody knows is an error
                return Outcome(name, None, None, changed=False)
            before = next((int(row.version) for row in rows if row.state == "READY"), None)
            wanted = modelset.read(self._home)
            engine = self._engine_name(name, before or wanted.get(name))
            modelset.write(self._home, {k: v for k, v in wanted.items() if k not in (name, engine)})
            draining = await self._end(name)
            noticed = await self._settled(name, lambda row: row is None)
            if engine is not None:
                await self._end(engine)
            tritonserver.sweep(self._found.shm_prefix, kill=False)
            return Outcome(name, None, before, draining=draining, noticed=noticed)

    async def _end(self, name: str) -> tuple[int, ...]:
        """Unload a model; the versions whose processes had to be ended."""
        self._say(f"unloading {name}")
        try:
            await self._repository.unload(name, self._timeout_s)
        except TruthGPTError as error:
            raise ControlError(f"{name} could not be unloaded: {error}", "see triton.log") from error
        self._say("letting it end what runs on it")
        draining = await self._gone(name, None, self._settings.drain_s + CUT_OFF_S)
        if draining:  # a stub that is stopped or hangs ends by no other means
            for stub in self._stubs(name):
                _kill(stub)
        return draining

    def _without_stopped(self, name: str, before: set[int], draining: tuple[int, ...]) -> tuple[int, ...]:
        """End those processes of the former version that are stopped, and so never would; the versions that go on."""
        had = {number for number in draining if self._stubs(name, number)}
        for stub in self._stubs(name):
            if stub.pid in before and not runs(stub.pid):
                _kill(stub)
        return tuple(number for number in draining if number not in had or self._stubs(name, number))

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
        self._triton = Triton(self._found.triton_http, Deadlines(heartbeat_s=self._settings.heartbeat_timeout_s))
        self._repository = Repository(self._triton, self._found.triton_grpc)
        try:
            yield
        finally:
            await self._triton.close()

    def _verify(self, entry: Entry, version: Version) -> None:
        """Raises ControlError when anything is wrong, before Triton has heard of it."""
        self._say(f"verifying {entry.name} version {version.number}")
        refused = verification.refusal(entry, version, self._advance)
        if refused is not None:
            raise ControlError(*refused)
        engine = models.engine_of(self._settings.model_repository, version)
        if engine is not None:
            self._verify(*engine)

    async def _bring_up(self, entry: Entry, version: Version, served: int | None) -> None:
        """Load a version and wait until it answers; what did not come up leaves no trace. Raises ControlError."""
        name, number = entry.name, version.number
        engine = models.engine_of(self._settings.model_repository, version)
        had = await self._ready(engine[0].name) if engine is not None else set()
        try:
            if engine is not None:  # beside the one that is served, which the model in front asks until it is replaced
                self._say(f"loading {engine[0].name} version {engine[1].number}")
                await self._load_versions(engine[0], {*had, engine[1].number}, self._timeout_s)
            self._say(f"loading {name} version {number}")
            await self._repository.load(name, self._timeout_s, entry.pinned(number))
            await self._answering(version)
        except BaseException as error:
            undone = await self._undo(entry, served)
            if engine is not None:
                undone = await self._undo_engine(engine[0], had) and undone
            if not isinstance(error, TruthGPTError):
                raise
            rest = f"version {served} goes on serving; " if served is not None and undone else ""
            log = self._settings.home / "logs" / "triton.log"
            message = f"{name} version {number} did not load: {_reason(error)}"
            raise ControlError(message, f"{rest}the whole log is {log}") from error
        self._note(name, number, engine)

    async def _load_versions(self, entry: Entry, numbers: set[int], within_s: float) -> None:
        """Have these versions of a graph loaded, as far as they are still in the repository. Raises TruthGPTError."""
        there = numbers & {version.number for version in entry.versions}
        await self._repository.load(entry.name, within_s, entry.pinned(*sorted(there)))

    async def _trim(self, former: str | None, version: Version) -> None:
        """Leave of the graphs those that the version that is served now needs."""
        try:
            engine = models.engine_of(self._settings.model_repository, version)
            if former is not None and (engine is None or engine[0].name != former):
                await self._end(former)
            if engine is not None and await self._ready(engine[0].name) != {engine[1].number}:
                await self._load_versions(engine[0], {engine[1].number}, self._timeout_s)
        except (TruthGPTError, ControlError, models.ModelsError) as error:  # it takes memory and does no harm
            self._say(f"what the former version needed is still loaded: {error}")

    async def _answering(self, version: Version) -> None:
        """Wait until what answers is this version. Raises TruthGPTError when it does not in time."""
        deadline, digest = time.monotonic() + self._timeout_s, version.digest
        while True:
            beat = await self._repository.beat(version.name, self._settings.engine_stall_s)
            if beat is None or beat.digest in ("", digest):
                return
            if time.monotonic() > deadline:
                raise UpstreamError(f"the entry that answers is {beat.digest}, not {digest}")
            await asyncio.sleep(POLL_S)

    async def _undo(self, entry: Entry, served: int | None) -> bool:
        """Bring back what was served before, also where this command was interrupted; whether that is so."""
        try:
            async with asyncio.timeout(UNDO_S):
                if served is None:
                    await self._repository.unload(entry.name, UNDO_S)
                elif await self._served(entry.name) != served:
                    await self._repository.load(entry.name, UNDO_S, entry.pinned(served))
        except (TruthGPTError, TimeoutError, models.ModelsError) as error:
            self._say(f"{entry.name} could not be brought back: {error}")
            return False
        tritonserver.sweep(self._found.shm_prefix, kill=False)
        return True

    async def _undo_engine(self, entry: Entry, had: set[int]) -> bool:
        try:
            async with asyncio.timeout(UNDO_S):
                if had:
                    await self._load_versions(entry, had, UNDO_S)
                else:
                    await self._repository.unload(entry.name, UNDO_S)
        except (TruthGPTError, TimeoutError, models.ModelsError) as error:
            self._say(f"{entry.name} could not be brought back: {error}")
            return False
        return True

    def _note(self, name: str, version: int, engine: tuple[Entry, Version] | None = None) -> None:
        wanted = modelset.read(self._home)
        former = self._engine_name(name, wanted.get(name))
        kept = {k: v for k, v in wanted.items() if k not in (name, former)}
        own = {engine[0].name: engine[1].number} if engine is not None else {}
        modelset.write(self._home, kept | own | {name: version})

    async def _rows(self, name: str) -> list[Row]:
        try:
            return await self._repository.rows(name)
        except TruthGPTError as error:
            hint = "it is started again by itself: try again in a moment; `truthgpt status` shows it"
            raise ControlError(f"Triton does not answer: {error}", hint) from error

    async def _served(self, name: str) -> int | None:
        """The version that new requests go to."""
        return max(await self._ready(name), default=None)

    async def _ready(self, name: str) -> set[int]:
        return {int(row.version) for row in await self._rows(name) if row.state == "READY"}

    def _stubs(self, name: str, version: int | None = None) -> list[psutil.Process]:
        return tritonserver.stubs(self._found.processes.get("triton"), name, version)

    def _processes(self, name: str, version: int | None = None) -> set[int]:
        return {stub.pid for stub in self._stubs(name, version)}

    async def _gone(self, name: str, kept: int | None, within_s: float) -> tuple[int, ...]:
        """Wait until every version but `kept` has ended; those that have not within the time."""
        deadline, seen = time.monotonic() + within_s, set[int]()
        while True:
            left = []
            for row in await self._rows(name):
                if not row.occupied or int(row.version) == kept:
                    continue
                # Triton says UNLOADING for ever of one whose stub was killed
                if self._stubs(name, int(row.version)):
                    seen.add(int(row.version))
                elif int(row.version) in seen:
                    continue
                left.append(int(row.version))
            if not left or time.monotonic() > deadline:
                return tuple(left)
            await asyncio.sleep(POLL_S)

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


def _kill(stub: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):  # it has just ended, or takes its time: nobody waits for it for ever
        stub.kill()
        stub.wait(CUT_OFF_S)


def _of_graph(verb: str, model: str) -> str:
    return f"`truthgpt models {verb} {model}` does both"


def _reason(error: TruthGPTError) -> str:
    """What the backend said, without Triton's wrapping and the backend's traceback."""
    text = str(error).partition("\n\nAt:")[0]
    for mark in ("TritonModelException: ", "state: Internal: ", "state: "):
        if mark in text:
            return text.partition(mark)[2].strip()
    return text.strip()
