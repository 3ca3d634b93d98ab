"""The models of one Triton server of a stack: one version brought up beside another, undone, trimmed and ended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from orchestrator import models
from orchestrator.errors import TruthGPTError, UpstreamError
from orchestrator.local import tritonserver
from orchestrator.local.places import Place
from orchestrator.local.process import runs
from orchestrator.models import Entry, Version
from orchestrator.settings import Settings
from orchestrator.triton import Deadlines, Repository, Row, Triton

POLL_S = 0.1
CUT_OFF_S = 4.0  # what the gateway has told to end needs this long at most
UNDO_S = 10.0


class ControlError(Exception):
    """What was asked was not done; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass
class Taken:
    """What a server had before it was changed: the version that was served, and those of the graph, if there is one."""

    served: int | None
    engine: Entry | None = None
    had: frozenset[int] = frozenset()


class ModelServer:
    """One server, of process `pid`, as it was when the command began. `timeout_s` bounds each loading."""

    def __init__(
        self, settings: Settings, place: Place, pid: int | None, timeout_s: float, say: Callable[[str], None]
    ) -> None:
        self.name, self._place = place.name, place
        self._settings, self._pid, self._timeout_s, self._say = settings, pid, timeout_s, say
        self._triton = Triton(place.http, Deadlines(heartbeat_s=settings.heartbeat_timeout_s))
        self._repository = Repository(self._triton, place.grpc)

    async def close(self) -> None:
        await self._triton.close()

    async def rows(self, name: str) -> list[Row]:
        """The index, of one model. Raises ControlError."""
        try:
            return await self._repository.rows(name)
        except TruthGPTError as error:
            hint = "it is started again by itself: try again in a moment; `truthgpt status` shows it"
            raise ControlError(f"Triton at {self._place.http} does not answer: {error}", hint) from error

    async def ready(self, name: str) -> set[int]:
        """The versions that answer. Raises ControlError."""
        return {int(row.version) for row in await self.rows(name) if row.state == "READY"}

    async def served(self, name: str) -> int | None:
        """The version that new requests go to. Raises ControlError."""
        return max(await self.ready(name), default=None)

    def stubs(self, name: str, version: int | None = None) -> list[psutil.Process]:
        return tritonserver.stubs(self._pid, name, version)

    def processes(self, name: str, version: int | None = None) -> set[int]:
        return {stub.pid for stub in self.stubs(name, version)}

    async def bring_up(self, entry: Entry, version: Version) -> Taken:
        """Load a version and wait until it answers; what was there before it. What did not come up leaves no trace.

        Raises ControlError.
        """
        name, number = entry.name, version.number
        engine = models.engine_of(self._settings.model_repository, version)
        taken = Taken(await self.served(name))
        if engine is not None:
            taken.engine, taken.had = engine[0], frozenset(await self.ready(engine[0].name))
        try:
            if engine is not None:  # beside the one that is served, which the model in front asks until it is replaced
                self._say(f"loading {engine[0].name} version {engine[1].number}")
                await self._load_versions(engine[0], taken.had | {engine[1].number}, self._timeout_s)
            self._say(f"loading {name} version {number}")
            await self._repository.load(name, self._timeout_s, entry.pinned(number))
            await self._answering(version)
        except BaseException as error:
            undone = await self.undo(entry, taken)
            if not isinstance(error, TruthGPTError):
                raise
            rest = f"version {taken.served} goes on serving; " if taken.served is not None and undone else ""
            log = self._settings.home / "logs" / self._place.log
            message = f"{name} version {number} did not load: {_reason(error)}"
            raise ControlError(message, f"{rest}the whole log is {log}") from error
        return taken

    async def undo(self, entry: Entry, taken: Taken, within_s: float = UNDO_S) -> bool:
        """Bring back what was there before, also where the command was interrupted; whether that is so.

        A version that had been replaced already has to be loaded again, which takes as long as any loading.
        """
        undone = await self._undo(entry, taken.served, within_s)
        if taken.engine is not None:
            undone = await self._undo_engine(taken.engine, taken.had, within_s) and undone
        return undone

    async def _undo(self, entry: Entry, served: int | None, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                if served is None:
                    await self._repository.unload(entry.name, within_s)
                elif await self.served(entry.name) != served:
                    await self._repository.load(entry.name, within_s, entry.pinned(served))
        except (TruthGPTError, ControlError, TimeoutError, models.ModelsError) as error:
            self._say(f"{entry.name} could not be brought back: {error}")
            return False
        self.sweep()
        return True

    async def _undo_engine(self, entry: Entry, had: frozenset[int], within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                if had:
                    await self._load_versions(entry, had, within_s)
                else:
                    await self._repository.unload(entry.name, within_s)
        except (TruthGPTError, TimeoutError, models.ModelsError) as error:
            self._say(f"{entry.name} could not be brought back: {error}")
            return False
        return True

    async def _load_versions(self, entry: Entry, numbers: frozenset[int], within_s: float) -> None:
        """Have these versions of a graph loaded, as far as they are still in the repository. Raises TruthGPTError."""
        there = numbers & {version.number for version in entry.versions}
        await self._repository.load(entry.name, within_s, entry.pinned(*sorted(there)))

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

    async def trim(self, former: str | None, version: Version) -> None:
        """Leave of the graphs those that the version that is served now needs."""
        try:
            engine = models.engine_of(self._settings.model_repository, version)
            if former is not None and (engine is None or engine[0].name != former):
                await self.unload(former)
                await self.ended(former)
            if engine is not None and await self.ready(engine[0].name) != {engine[1].number}:
                await self._load_versions(engine[0], frozenset({engine[1].number}), self._timeout_s)
        except (TruthGPTError, ControlError, models.ModelsError) as error:  # it takes memory and does no harm
            self._say(f"what the former version needed is still loaded: {error}")

    async def unload(self, name: str) -> None:
        """Have a model refuse what is new; what runs on it may end. Raises ControlError."""
        self._say(f"unloading {name}")
        try:
            await self._repository.unload(name, self._timeout_s)
        except TruthGPTError as error:
            raise ControlError(f"{name} could not be unloaded: {error}", f"see {self._place.log}") from error

    async def ended(self, name: str) -> tuple[int, ...]:
        """Wait until an unloaded model has ended; the versions whose processes had to be ended."""
        self._say("letting it end what runs on it")
        draining = await self.gone(name, None, self._settings.drain_s + CUT_OFF_S)
        if draining:  # a stub that is stopped or hangs ends by no other means
            for stub in self.stubs(name):
                _kill(stub)
        return draining

    async def gone(self, name: str, kept: int | None, within_s: float) -> tuple[int, ...]:
        """Wait until every version but `kept` has ended; those that have not within the time."""
        deadline, seen = time.monotonic() + within_s, set[int]()
        while True:
            left = []
            for row in await self.rows(name):
                if not row.occupied or int(row.version) == kept:
                    continue
                # Triton says UNLOADING for ever of one whose stub was killed
                if self.stubs(name, int(row.version)):
                    seen.add(int(row.version))
                elif int(row.version) in seen:
                    continue
                left.append(int(row.version))
            if not left or time.monotonic() > deadline:
                return tuple(left)
            await asyncio.sleep(POLL_S)

    def without_stopped(self, name: str, before: set[int], draining: tuple[int, ...]) -> tuple[int, ...]:
        """End those processes of the former version that are stopped, and so never would; the versions that go on."""
        had = {number for number in draining if self.stubs(name, number)}
        for stub in self.stubs(name):
            if stub.pid in before and not runs(stub.pid):
                _kill(stub)
        return tuple(number for number in draining if number not in had or self.stubs(name, number))

    def sweep(self) -> None:
        """Remove the shared memory that nobody uses any more."""
        tritonserver.sweep(self._place.shm_prefix, kill=False)


def _kill(stub: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):  # it has just ended, or takes its time: nobody waits for it for ever
        stub.kill()
        stub.wait(CUT_OFF_S)


def _reason(error: TruthGPTError) -> str:
    """What the backend said, without Triton's wrapping and the backend's traceback."""
    text = str(error).partition("\n\nAt:")[0]
    for mark in ("TritonModelException: ", "state: Internal: ", "state: "):
        if mark in text:
            return text.partition(mark)[2].strip()
    return text.strip()
